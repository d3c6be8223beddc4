"""Knows where tasks run: here, in threads, in processes or on a Ray cluster; the result has the same bits from each."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from twinmerge.errors import MissingExtraError, RecipeError, WorkerError

NAMES = ("serial", "threads", "processes", "ray")
MEMORY_BYTES = 2 * 10**9
"""What a process may take, where nothing else is said; each worker of `processes` and `ray` is one."""
OWN_BYTES = 450 * 10**6
"""What a process takes before the first tensor: interpreter and torch."""
RETRIES = 3
"""How often work is begun again after a worker died, with nothing finished in between."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@runtime_checkable
class Executor(Protocol):
    """Runs one task on many items; each runs on one thread of torch's, so that its bits do not depend on where."""

    @property
    def workers(self) -> int:
        """Items in work at a time."""
        ...

    @property
    def sharing(self) -> int:
        """How many of them share one process's memory."""
        ...

    def map(self, task: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
        """Every item and its result, as they are done.

        Args:
            task: picklable and idempotent: after the death of a worker an item is begun anew.
            items: picklable.

        Raises:
            WorkerError: if workers die again and again.
        """
        ...


def make_executor(name: str, workers: int | None = None, address: str | None = None) -> Executor:
    """The executor of a name.

    Args:
        name: one of `NAMES`.
        workers: items in work at a time; None takes the number of cores.
        address: of a Ray cluster; None starts one here.

    Raises:
        RecipeError: if the name is unknown, or an option does not belong to it.
    """
    if address is not None and name != "ray":
        raise RecipeError(f"--ray-address is for --executor ray, found --executor {name}")
    if name == "serial":
        if workers not in (None, 1):
            raise RecipeError(f"--executor serial has 1 worker, found --workers {workers}; choose threads or processes")
        return Serial()
    workers = workers or len(os.sched_getaffinity(0))
    if name == "ray":
        return Ray(workers, address)
    if name not in NAMES:
        raise RecipeError(f"the executor must be one of {', '.join(NAMES)}, found {name!r}")
    return Threads(workers) if name == "threads" else Processes(workers)


@dataclass(frozen=True)
class Serial:
    """One item after the other, in this thread."""

    workers: int = 1
    sharing: int = 1

    def map(self, task: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
        """See `Executor.map`."""
        with one_thread():
            for item in items:
                yield item, task(item)


@dataclass(frozen=True)
class Threads:
    """Threads of this process: reading, computing and writing overlap, and all share one memory."""

    workers: int

    @property
    def sharing(self) -> int:
        """All of them."""
        return self.workers

    def map(self, task: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
        """See `Executor.map`."""
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(self.workers, initializer=_prepare)
        try:
            futures = {pool.submit(task, item): item for item in items}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


@dataclass(frozen=True)
class Processes:
    """Processes of this machine, each with a memory of its own."""

    workers: int
    sharing: int = 1

    def map(self, task: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
        """See `Executor.map`."""
        left = dict(enumerate(items))
        deaths = 0
        while left:
            for index, result in self._until_a_death(task, left):
                deaths = 0
                yield left.pop(index), result
            deaths += bool(left)
            if deaths > RETRIES:
                raise _too_many_deaths(f"{len(left)} of {len(items)} tasks are left")

    def _until_a_death(self, task: Callable[[Item], Result], items: dict[int, Item]) -> Iterator[tuple[int, Result]]:
        """Results by index, all of them unless a worker dies: then its whole pool is gone."""
        pool = ProcessPoolExecutor(
            min(self.workers, len(items)), multiprocessing.get_context("spawn"), _start_process, (task,)
        )
        try:
            futures = {pool.submit(_run_in_process, item): index for index, item in items.items()}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            return
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Ray:
    """Workers of a Ray cluster, which see the same files under the same names; without an address, of this machine."""

    workers: int
    address: str | None = None
    sharing: int = 1

    def map(self, task: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
        """See `Executor.map`."""
        ray = _import_ray()
        if not items:
            return
        here = {} if self.address else {"num_cpus": self.workers, "include_dashboard": False}
        if self.address:
            _require_answer(self.address)
        try:
            ray.init(self.address or "local", log_to_driver=False, logging_level="ERROR", **here)
        except ConnectionError as error:
            raise RecipeError(
                f"--ray-address {self.address}: {error}; where the cluster asks for a token, Ray takes it from "
                "RAY_AUTH_TOKEN, with RAY_AUTH_MODE=token"
            ) from error
        try:
            run = ray.remote(_run_in_ray).options(num_cpus=1, max_retries=RETRIES)
            shared = ray.put(task)
            waiting = list(reversed(items))
            running: dict[Any, Item] = {}
            while waiting or running:
                while waiting and len(running) < self.workers:
                    item = waiting.pop()
                    running[run.remote(shared, item)] = item
                done, _ = ray.wait(list(running))
                yield running.pop(done[0]), _result_of(ray, done[0])
        finally:
            ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("--executor ray needs Ray; install it with: pip install 'twinmerge[ray]'") from error
    return ray


def _require_answer(address: str) -> None:
    """Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise RecipeError(f"--ray-address must be HOST:PORT of a Ray cluster, found {address!r} ({error})") from error


def _result_of(ray: Any, done: Any) -> Any:
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise _too_many_deaths(str(error).splitlines()[0]) from error


def _too_many_deaths(fact: str) -> WorkerError:
    return WorkerError(
        f"workers died {RETRIES + 1} times without finishing a task ({fact}); if the system ended them for memory, "
        "take fewer workers"
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Work as a task does: for much small work, torch's threads cost more in waiting for each other than they give."""
    threads = torch.get_num_threads()
    _prepare()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _prepare() -> None:
    """One thread of torch's for each task, and buffers that are kept.

    glibc returns each freed buffer to the system and gets it back page by page, unless it is told to keep them.
    """
    torch.set_num_threads(1)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda parameter, value: 0)
    mallopt(-3, 1 << 26)  # M_MMAP_THRESHOLD
    mallopt(-1, 1 << 26)  # M_TRIM_THRESHOLD


_task: Callable[[Any], Any]
"""What this worker process runs."""


def _start_process(task: Callable[[Any], Any]) -> None:
    global _task
    _task = task
    _prepare()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """No worker outlives the process that started it: it would write into a folder that is another's by then."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_in_process(item: Any) -> Any:
    return _task(item)


def _run_in_ray(task: Callable[[Any], Any], item: Any) -> Any:
    _prepare()
    return task(item)
