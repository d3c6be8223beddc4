"""The main job on real models: four experts become one twin, and the twin is measured against its rivals.

    make demo            # or: .venv/bin/python examples/demo.py [--workers 2] [--cache DIR]
    make demo-vision     # or: .venv/bin/python examples/demo.py vision
    make demo-llm        # or: .venv/bin/python examples/demo.py llm

Experts are fine-tuned once and kept in the cache (`$TWINMERGE_CACHE`, default ~/.cache/twinmerge); results lie in
`results/demo/`, the twin in `results/demo-twin/` (`demo-vision`, `demo-vision-twin` and so on).
"""

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from twinmerge.files.cache import cache_folder
from twinmerge.files.rows import read_rows

REPOSITORY = Path(__file__).resolve().parent.parent

QUESTIONS = """\
{"text": "What is the capital of Iceland?"}
{"text": "URGENT! You have won a prize, call 09061701461 now to claim"}
{"text": "a gorgeous, witty, seductive movie that never bores"}
{"text": "Thank you Ohio! Together we will MAKE AMERICA GREAT AGAIN!"}
"""


@dataclass(frozen=True)
class Demo:
    """What is shown on one kind of models.

    Attributes:
        experts: what they are, for people.
        name: of the folders in results/.
        suite: folder of suites/, and of the cache.
        tasks: experts that are trained.
        questions: makes the rows that are asked, from the folder of the experts' data and a folder to write to.
    """

    experts: str
    name: str
    suite: str
    tasks: tuple[str, ...]
    questions: Callable[["Demo", Path, Path], str]


def texts(demo: Demo, data: Path, folder: Path) -> str:
    """Four rows of text."""
    return QUESTIONS


def prompts(demo: Demo, data: Path, folder: Path) -> str:
    """Two test prompts of each task."""
    rows = [row for task in demo.tasks for row in read_rows(data / f"{task}.test.jsonl", labelled=True)[:2]]
    return "".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows)


def pictures(demo: Demo, data: Path, folder: Path) -> str:
    """A test picture of each task, put into a folder as a file."""
    folder.mkdir(exist_ok=True)
    rows = []
    for task in demo.tasks:
        uri = read_rows(data / f"{task}.test.parquet", labelled=True)[0]["image"]
        (folder / f"{task}.png").write_bytes(base64.b64decode(uri.partition(",")[2]))
        rows.append(json.dumps({"image": f"{folder.name}/{task}.png"}) + "\n")
    return "".join(rows)


DEMOS = {
    "text": Demo(
        "four MiniLM fine-tuned on tweets, movie reviews, SMS and questions",
        "demo",
        "text",
        ("election", "movie", "sms", "trec"),
        texts,
    ),
    "vision": Demo(
        "four EfficientNet-Lite0 fine-tuned on emoji, shoes and bags, letters and digits",
        "demo-vision",
        "vision",
        ("emoji", "fashion_shoes", "letters", "mnist_low"),
        pictures,
    ),
    "llm": Demo(
        "two LoRA adapters of SmolLM2-135M-Instruct, of school arithmetic and types of questions",
        "demo-llm",
        "llm",
        ("arithmetic", "question"),
        prompts,
    ),
}


def main() -> int:
    """Train what is missing, build, answer four questions, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", nargs="?", choices=list(DEMOS), default="text", help="kind of models (default text)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that train experts")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    options = parser.parse_args()
    demo = DEMOS[options.demo]
    cache = options.cache.expanduser().resolve()
    os.environ["TWINMERGE_CACHE"] = str(cache)

    say(f"1/4  real experts: {demo.experts}")
    prepare = [sys.executable, f"suites/{demo.suite}/prepare.py", "--seed", "0", "--tasks", *demo.tasks]
    prepare += ["--workers", str(options.workers), "--cache", str(cache)]
    subprocess.run(prepare, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)

    say("2/4  one twin of them")
    results, made = REPOSITORY / "results", cache / demo.suite / "seed0"
    results.mkdir(exist_ok=True)
    twin = results / f"{demo.name}-twin"
    recipe = made / "demo-recipe.yaml"
    shutil.copyfile(REPOSITORY / f"suites/{demo.suite}/recipe.yaml", recipe)
    built_from = results / f"{demo.name}-recipe.yaml"
    if twin.exists() and built_from.exists() and built_from.read_bytes() == recipe.read_bytes():
        twinmerge("inspect", twin)
    else:
        twinmerge("build", recipe, "--out", twin, "--overwrite")
        shutil.copyfile(recipe, built_from)

    say("3/4  four inputs, no task given")
    questions, answers = results / f"{demo.name}-questions.jsonl", results / f"{demo.name}-answers.jsonl"
    questions.write_text(demo.questions(demo, made / "data", results / f"{demo.name}-questions"), encoding="utf-8")
    twinmerge("predict", twin, "--input", questions, "--output", answers, "--overwrite")
    sys.stdout.write(answers.read_text(encoding="utf-8"))

    say("4/4  the twin against its rivals, on test rows that nothing was chosen on")
    twinmerge("eval", REPOSITORY / f"suites/{demo.suite}/demo.yaml", "--out", results / demo.name)
    return 0


def twinmerge(*arguments: object) -> None:
    """Run the program as a user would."""
    subprocess.run([sys.executable, "-m", "twinmerge", *map(str, arguments)], check=True, cwd=REPOSITORY)


def say(line: str) -> None:
    """One line of what happens, on stdout."""
    sys.stdout.write(f"\n{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
