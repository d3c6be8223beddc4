"""The main job on real models: four MiniLM experts become one twin, and the twin is measured against its rivals.

    make demo            # or: .venv/bin/python examples/demo.py [--workers 2] [--cache DIR]

Experts are fine-tuned once and kept in the cache (`$TWINMERGE_CACHE`, default ~/.cache/twinmerge); results lie in
`results/demo/`, the twin in `results/demo-twin/`.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from twinmerge.files.cache import cache_folder

REPOSITORY = Path(__file__).resolve().parent.parent

TASKS = ("election", "movie", "sms", "trec")
QUESTIONS = """\
{"text": "What is the capital of Iceland?"}
{"text": "URGENT! You have won a prize, call 09061701461 now to claim"}
{"text": "a gorgeous, witty, seductive movie that never bores"}
{"text": "Thank you Ohio! Together we will MAKE AMERICA GREAT AGAIN!"}
"""


def main() -> int:
    """Train what is missing, build, answer four questions, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that train experts")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    options = parser.parse_args()
    cache = options.cache.expanduser().resolve()
    os.environ["TWINMERGE_CACHE"] = str(cache)

    say("1/4  real experts: four MiniLM fine-tuned on tweets, movie reviews, SMS and questions")
    prepare = [
        sys.executable,
        "suites/text/prepare.py",
        "--seed",
        "0",
        "--tasks",
        *TASKS,
        "--workers",
        str(options.workers),
    ]
    subprocess.run([*prepare, "--cache", str(cache)], check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)

    say("2/4  one twin of them")
    results = REPOSITORY / "results"
    results.mkdir(exist_ok=True)
    twin = results / "demo-twin"
    recipe = cache / "text" / "seed0" / "demo-recipe.yaml"
    shutil.copyfile(REPOSITORY / "suites/text/recipe.yaml", recipe)
    built_from = results / "demo-recipe.yaml"
    if twin.exists() and built_from.exists() and built_from.read_bytes() == recipe.read_bytes():
        twinmerge("inspect", twin)
    else:
        twinmerge("build", recipe, "--out", twin, "--overwrite")
        shutil.copyfile(recipe, built_from)

    say("3/4  four inputs, no task given")
    questions, answers = results / "demo-questions.jsonl", results / "demo-answers.jsonl"
    questions.write_text(QUESTIONS, encoding="utf-8")
    twinmerge("predict", twin, "--input", questions, "--output", answers, "--overwrite")
    sys.stdout.write(answers.read_text(encoding="utf-8"))

    say("4/4  the twin against its rivals, on test rows that nothing was chosen on")
    twinmerge("eval", REPOSITORY / "suites/text/demo.yaml", "--out", results / "demo")
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
