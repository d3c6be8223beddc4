"""What tests let worker processes do; light, as each of them imports it."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twinmerge.errors import MismatchError


@dataclass(frozen=True)
class _Dying:
    """Does a task so many times, in all processes together; then the process that is to do it dies."""

    task: Callable[[Any], Any]
    folder: Path
    times: int

    def __call__(self, item: Any) -> Any:
        if len(list(self.folder.iterdir())) >= self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        result = self.task(item)
        (self.folder / str(time.monotonic_ns())).touch()
        return result


@dataclass(frozen=True)
class Deadly:
    """An executor whose workers die after so many tasks."""

    executor: Any
    folder: Path
    times: int

    @property
    def workers(self) -> int:
        return self.executor.workers

    @property
    def sharing(self) -> int:
        return self.executor.sharing

    def map(self, task: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        return self.executor.map(_Dying(task, self.folder, self.times), items)


@dataclass(frozen=True)
class Square:
    """Squares numbers; refuses one, and the worker that gets another dies, the first times."""

    folder: Path
    refused: int = -1
    deadly: int = -1
    deaths: int = 0

    def __call__(self, number: int) -> tuple[int, int]:
        if number == self.refused:
            raise MismatchError(f"{number} is refused")
        died = len(list(self.folder.iterdir()))
        if number == self.deadly and died < self.deaths:
            (self.folder / str(died)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number**2, torch.get_num_threads()
