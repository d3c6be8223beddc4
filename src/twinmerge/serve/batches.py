"""Gathers requests that come at about the same time, so that one batch answers them all."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

from twinmerge.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Gathered(Generic[Item, Result]):
    """Answers items one by one, computes them in batches.

    A batch begins with the first item, waits a few milliseconds for more, and while one is computed the next gathers.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Item]], list[Result]],
        executor: Executor,
        *,
        rows: int,
        wait_s: float,
        told: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Take what computes a batch.

        Args:
            compute: called on the executor with at most `rows` items; gives as many results.
            executor: one thread of it at a time.
            rows: of a batch, at most.
            wait_s: seconds that a batch waits for more.
            told: called with the size of every batch.
        """
        self.compute, self.executor, self.rows, self.wait_s, self.told = compute, executor, rows, wait_s, told
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def ask(self, items: Sequence[Item]) -> list[Result]:
        """Results of some items, in their order.

        Raises:
            InputError: of the first item that cannot be answered; others that shared its batch are.
        """
        futures: list[asyncio.Future[Result]] = [asyncio.get_running_loop().create_future() for _ in items]
        self._waiting += zip(items, futures, strict=True)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            return list(await asyncio.gather(*futures))
        finally:
            for future in futures:
                future.cancel()  # nobody waits for the rest

    async def _work(self) -> None:
        await asyncio.sleep(self.wait_s)
        while self._waiting:
            self._waiting = [(item, future) for item, future in self._waiting if not future.done()]
            batch, self._waiting = self._waiting[: self.rows], self._waiting[self.rows :]
            if batch:
                self.told(len(batch))
                await self._answer(batch)

    async def _answer(self, batch: Sequence[tuple[Item, asyncio.Future[Result]]]) -> None:
        """Answer a batch; one that holds an item which cannot be answered, item by item."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self.executor, self.compute, [item for item, _ in batch])
        except InputError as error:
            if len(batch) == 1:
                _give(batch[0][1], error)
                return
            for one in batch:
                await self._answer([one])
            return
        except Exception as error:  # noqa: BLE001 - handed to those who wait, the worker goes on
            for _, future in batch:
                _give(future, error)
            return
        for (_, future), result in zip(batch, found, strict=True):
            if not future.done():
                future.set_result(result)


def _give(future: "asyncio.Future[Result]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
