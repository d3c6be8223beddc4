"""Holds the gate of a call under way, where every layer of a model finds it."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import GateError
from twinmerge.runtime.paths import Path, Paths

Merged = Sequence[tuple[Sequence[int], Mapping[str, Tensor]]]
"""Rows under one gate, and its merged weights by the layer's name."""


def keep_large(gate: Tensor, below: float) -> Tensor:
    """Drop small gates and share out what they held among the others, in proportion.

    With dropped mass d = sum of a row's gates under `below` (at most (experts - 1) * below), the gates of a row move by
    2d in all, so a layer's output moves by at most `2 d max_t |D_t x|`, D_t being the exclusive parts. A row's largest
    gate always stays.

    Args:
        gate: (batch, expert), rows without negative weights.
        below: gates under it are dropped; 0 drops none.
    """
    kept = torch.where((gate >= below) | (gate == gate.amax(dim=1, keepdim=True)), gate, 0.0)
    return kept * (
        gate.sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True).clamp_min(torch.finfo(gate.dtype).tiny)
    )


class GateContext(Paths):
    """The gate of one forward pass, or of one generation, as the layers need it."""

    def __init__(
        self,
        gate: Tensor,
        *,
        path: Path | None = None,
        keep: bool = False,
        merged: Merged | None = None,
        packed: bool = False,
    ) -> None:
        """Look at a gate.

        Args:
            gate: (row, expert); inputs of layers are rows * anything: beams, tokens or packed tokens of each row.
                A batch under one gate becomes a single row.
            path: forced; None chooses by cost.
            keep: the gate serves many calls (a generation): what is copied for a short call is kept.
            merged: weights to be used, where the layers do not compute with factors.
            packed: inputs of layers are (1, token, ...), texts end to end, and the gate has a row a token.
        """
        super().__init__(without_repeats(gate), path=path, keep=keep)
        self.packed = packed and self.row_count > 1
        self.merged = merged
        self.projected: tuple[object, Tensor, tuple[Tensor, Tensor | None]] | None = None
        """The last projection, its input and what came out: layers that read one input share it."""
        self.vectors: dict[int, tuple[Tensor, ...]] = {}
        """1-D parameters under the gate, by the bank that mixed them."""

    def rows(self, count: int) -> Tensor:
        """The gate for `count` rows, (count, expert): repeated for beams, heads or packed tokens of each input.

        Raises:
            GateError: if `count` is no multiple of the gate's rows.
        """
        if count == self.row_count:
            return self.gate
        return self.gate.repeat_interleave(self.repeats(count), dim=0)

    def repeats(self, count: int) -> int:
        """How many of `count` rows of a layer's input belong to each gate.

        Raises:
            GateError: if `count` is no multiple of the gate's rows.
        """
        repeats, rest = divmod(count, self.row_count)
        if rest:
            raise GateError(f"a gate of {self.row_count} rows cannot serve a layer's {count} rows; it must divide them")
        return repeats

    def split(self, x: Tensor) -> Tensor:
        """A layer's input (rows, ..., features) as (row of the gate, token, features).

        Raises:
            GateError: if its rows are no multiple of the gate's.
        """
        if x.ndim == 3 and x.shape[0] == self.row_count:
            return x
        if not self.packed:
            self.repeats(x.shape[0])
        return x.reshape(self.row_count, -1, x.shape[-1])

    def column(self, expert: int, rows: int, ndim: int) -> Tensor:
        """One expert's gate, to multiply an input of so many rows and axes with."""
        if self.packed:
            return self.gate[:, expert].reshape(1, -1, *(1,) * (ndim - 2))
        return self.rows(rows)[:, expert].reshape(-1, *(1,) * (ndim - 1))


def without_repeats(gate: Tensor) -> Tensor:
    """A batch under one gate as a single row, any other as it is."""
    return gate[:1] if len(gate) > 1 and bool((gate == gate[:1]).all()) else gate


class GateSlot(threading.local):
    """Where one model's layers find the gate of the call under way; each thread has its own."""

    context: GateContext | None = None
    probe: Any = None
    """What looks at hidden states on their way (`features.Probe`)."""

    def __reduce__(self) -> Any:
        """A copy of a model has a slot of its own, and no call under way."""
        return GateSlot, ()

    @contextmanager
    def watch(self, probe: Any) -> Iterator[None]:
        """Show hidden states to a probe."""
        self.probe = probe
        try:
            yield
        finally:
            self.probe = None

    @contextmanager
    def use(self, context: GateContext | None) -> Iterator[None]:
        """Run a forward pass under a gate, None for the shared expert alone."""
        before, self.context = self.context, context
        try:
            yield
        finally:
            self.context = before
