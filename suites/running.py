"""Runs trainings side by side, one thread each, and shows how far they are; what all suites' programs share."""

import argparse
import hashlib
import multiprocessing
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from queue import Empty
from typing import Any, NoReturn, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as Bar
from rich.text import Text

from twinmerge.files.cache import cache_folder

FAILED, USAGE = 1, 2
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**26)}
"""For glibc, in workers: memory of a step is kept for the next, not given back and asked for again."""

Report = Callable[[str, int, float], None]
"""Called with the task, the steps done, and the loss of the last one."""

_messages: Any = None  # in a worker: the queue to the parent, set by _start_worker


class Job(Protocol):
    """A training."""

    @property
    def task(self) -> str:
        """What it is called."""

    @property
    def steps(self) -> int:
        """How many updates it takes."""


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, and has the options of every suite."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with 2."""
        self.exit(USAGE, f"error: {message}\n")

    def parse_common(self, arguments: Sequence[str] | None, fixed: str) -> argparse.Namespace:
        """Read a command line that may say `--seed`, `--workers`, `--cache` and `--json` too.

        Args:
            arguments: without the program's name.
            fixed: what the seed does not decide.
        """
        self.add_argument("--seed", type=int, default=0, help=f"decides splits and training, not {fixed} (default 0)")
        self.add_argument("--workers", type=int, default=2, help="experts trained at once, one thread each (default 2)")
        self.add_argument(
            "--cache", type=Path, default=cache_folder(), help="default $TWINMERGE_CACHE or ~/.cache/twinmerge"
        )
        self.add_argument("--json", action="store_true", help="print the result as one JSON line")
        options = self.parse_args(arguments)
        for name, least in (("seed", 0), ("workers", 1)):
            if getattr(options, name) < least:
                self.error(f"--{name} must be {least} or more, not {getattr(options, name)}")
        return options

    def require_known(self, asked: Sequence[str] | None, known: Collection[str], kind: str = "task") -> None:
        """Refuse a name that is none of those known."""
        for name in asked or ():
            if name not in known:
                self.error(f"unknown {kind} {name!r}; {kind}s are {', '.join(known)}")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file, which appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    temporary.replace(path)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill, which takes the target's place once it is whole."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    temporary.replace(target)


def quiet_transformers() -> None:
    """No bars and no warnings, of which a worker has none to show."""
    import transformers  # seconds to load

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # published without types
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def begin_training(*words: object) -> int:
    """Make a training quiet, of one thread, and repeatable: seeds torch by the words, and gives the seed."""
    import torch  # seconds to load, and only training needs it

    torch.set_num_threads(1)
    quiet_transformers()
    seed = int.from_bytes(hashlib.sha256("/".join(map(str, words)).encode()).digest()[:4], "big")
    torch.manual_seed(seed)
    return seed


class Rate(ProgressColumn):
    """Steps a second."""

    def render(self, task: Bar) -> Text:
        """Return the rate, empty as long as it is unknown."""
        return Text(f"{task.speed:.1f} steps/s" if task.speed else "", style="progress.data.speed")


def run_jobs(
    jobs: Sequence[Job], train: Callable[[Any, Report], dict[str, Any]], workers: int, console: Console
) -> list[str]:
    """Train all, in the order given.

    Args:
        jobs: what to train.
        train: a function of a module, called in a worker with a job; gives `metric`, `validation_score`, `seconds`
            and `steps`.
        workers: processes, one thread each.
        console: progress goes here.

    Returns:
        The tasks whose training failed.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", **KEEP_MEMORY}
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        Rate(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with (
        Progress(*columns, console=console) as progress,
        ProcessPoolExecutor(workers, context, _start_worker, (messages,)) as pool,
    ):
        bars = {"": progress.add_task("all experts", total=sum(job.steps for job in jobs), note="")}
        bars |= {job.task: progress.add_task(job.task, total=job.steps, note="", start=False) for job in jobs}
        pending = {pool.submit(_work, train, job): job.task for job in jobs}
        return _follow(pending, messages, progress, bars)


def _start_worker(messages: Any) -> None:
    global _messages
    _messages = messages


def _work(train: Callable[[Any, Report], dict[str, Any]], job: Any) -> dict[str, Any]:
    return train(job, lambda task, step, loss: _messages.put((task, step, loss)))


def _follow(pending: dict[Future[Any], str], messages: Any, progress: Progress, bars: dict[str, Any]) -> list[str]:
    """Show what the workers report until all are done; return the tasks that failed."""
    steps: dict[str, int] = {}
    failed = []
    while pending:
        done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
        for task, step, loss in _drain(messages):
            if task not in steps:
                progress.start_task(bars[task])
            steps[task] = step
            progress.update(bars[task], completed=step, note=f"loss {loss:.3f}")
            progress.update(bars[""], completed=sum(steps.values()))
        for future in done:
            task = pending.pop(future)
            error = future.exception()
            if error is None:
                facts = future.result()
                note = f"{facts['metric']} {facts['validation_score']:.3f}"
                progress.update(bars[task], completed=facts["steps"], note=note)
                progress.console.print(f"expert {task}: validation {note}, {facts['seconds']:.0f} s")
            else:
                failed.append(task)
                progress.update(bars[task], note="failed")
                message = f"error: expert {task}: {type(error).__name__}: {error}"
                progress.console.print(message, markup=False, soft_wrap=True)
    return failed


def _drain(messages: Any) -> list[tuple[str, int, float]]:
    found = []
    while True:
        try:
            found.append(messages.get_nowait())
        except Empty:
            return found
