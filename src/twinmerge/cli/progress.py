"""Says on stderr how far long work is: bars on a terminal, elsewhere a line every few seconds; rates and time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_S = 5.0
"""Between two lines of one stage, where stderr is no terminal."""
Report = Callable[[str, int, int | None], None]


class Lines:
    """Progress as lines: of each stage its end, and every `EVERY_S` seconds how far it is."""

    def __init__(self, write: Callable[[str], object], *, quiet: bool, clock: Callable[[], float] = time.monotonic):
        """Begin.

        Args:
            write: takes a line.
            quiet: stages that end before their first line are not told.
            clock: gives seconds.
        """
        self.write, self.quiet, self.clock = write, quiet, clock
        self.stages: dict[str, tuple[float, int, float]] = {}
        """Stage -> when it began, how much was done then, when it was last told."""

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Take a report."""
        now = self.clock()
        began, before, told = self.stages.setdefault(stage, (now, done, now))
        over = total is not None and done >= total
        if not over and now - told < EVERY_S:
            return
        self.stages[stage] = began, before, now
        rate = (done - before) / (now - began) if now > began else 0.0
        if over:
            del self.stages[stage]
            if not self.quiet or told > began or now - began >= EVERY_S:
                self.write(f"{stage}: {done:,}" + (f" in {now - began:,.0f} s" if now - began >= 1 else ""))
            return
        left = f", {(total - done) / rate:,.0f} s left" if total is not None and rate else ""
        self.write(f"{stage}: {done:,}" + (f" of {total:,}" if total else "") + f", {rate:,.1f}/s{left}")


@contextmanager
def shown_progress(*, quiet: bool = False) -> Iterator[Report]:
    """What long work reports to; see `Lines` for `quiet`, which bars do not need."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(lambda line: console.print(line, highlight=False, soft_wrap=True), quiet=quiet)
        return
    rate = TextColumn("{task.fields[rate]}")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate
    stages: dict[str, tuple[int, float, int]] = {}
    with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console) as bars:

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in stages:
                stages[stage] = int(bars.add_task(stage, total=total, rate="")), time.monotonic(), done
            task, began, before = stages[stage]
            took = time.monotonic() - began
            bars.update(bars.task_ids[task], completed=done, rate=f"{(done - before) / took:,.1f}/s" if took else "")
            if total is not None and done >= total:
                del stages[stage]

        yield report
