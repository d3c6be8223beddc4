"""Chooses which ranks a layer takes for the rows of a call, and the cheaper of two ways to use them.

A factor of a layer holds the ranks of all experts one after the other, (rank, in) or (rank, out). For a batch there are
two ways to use it, and the cheaper one is taken call by call:

- `all`: every rank that some row uses, for every row, the gate multiplied in between: one product, but its width grows
  with the number of different experts in the batch;
- `gather`: each row's own ranks, copied next to each other, then one small product a row, whatever the number of
  experts. Its width is what most rows use; what the busier ones use beyond that is added for those rows alone. In the
  steps of a generation, one token a row, it is the other way round: rows are gathered by expert.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor

Path = Literal["all", "gather"]
_COPY = 4.0
"""Measured on CPU: copying a rank costs what a product with it costs for 4 tokens."""
_BUSY = 2.0
"""What a rank costs for a row that is picked out of the batch, and whose result is added to the others'."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """How many ranks each expert has in one layer; equal counts are one object (`Ranks.of`), a key."""

    counts: tuple[int, ...]
    tables: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @staticmethod
    @cache
    def of(counts: tuple[int, ...]) -> "Ranks":
        """The one object for these counts."""
        return Ranks(counts)

    def __reduce__(self) -> Any:
        """Copies and pickles are the one object too."""
        return Ranks.of, (self.counts,)

    @property
    def total(self) -> int:
        """Ranks of all experts together."""
        return sum(self.counts)

    def table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Each expert's ranks, (expert, most) indices padded with 0, and 1 where one is real, 0 where it is padding."""
        if device not in self.tables:
            counts = torch.tensor(self.counts)
            place = torch.arange(max(self.counts))
            real = place < counts[:, None]
            index = torch.where(real, (counts.cumsum(0) - counts)[:, None] + place, 0)
            self.tables[device] = index.to(device), real.to(device)
        return self.tables[device]


@dataclass(frozen=True, slots=True)
class Picked:
    """Ranks taken for a batch."""

    index: Tensor | slice | None
    """(rank,) for `all`, a slice if they lie together, None if every rank is taken; (row * rank,) for `gather`."""
    gate: Tensor
    """(row, 1, rank)."""
    ones: bool
    """Whether every gate is 1, so that nothing needs to be multiplied."""
    places: tuple[slice, ...]
    """Where each layer's ranks lie among them."""


Whose = Literal["rows", "most", "busy", "experts"]
"""Whose ranks `gather` takes: all of each row's; those of the width of all; busy rows' beyond it; each expert's."""


@dataclass(frozen=True, slots=True)
class ByExpert:
    """Rows of one token gathered by the expert they use."""

    rows: Tensor
    """(expert * slot,) indices, the slots of an expert side by side; some are padding."""
    combine: Tensor
    """(row, expert * slot), the gates: adds up what the experts give, 0 for padding."""


@dataclass(frozen=True, slots=True)
class Taken:
    """Ranks that layers which read one input take for some rows."""

    rows: Tensor | None
    """(row,) indices; None is all of them."""
    picked: Picked
    """Of their `down` factors, which lie one after the other."""
    own: tuple[Picked, ...]
    """Of each layer's `up` factor."""


@dataclass(frozen=True, slots=True)
class Step:
    """How layers that read one input take part in a call."""

    path: Path
    all_rows: Taken
    busy_rows: Taken | None = None
    """What the rows with the most experts use beyond the width of all."""
    by_expert: ByExpert | None = None
    """If rows are gathered by expert; `all_rows` then are the experts'."""


class Paths:
    """The ranks that layers take for the rows of one gate, looked up once for all layers that are alike.

    What is read from the gate's values is read here, once, so that no layer waits for a device.
    """

    def __init__(self, gate: Tensor, *, path: Path | None = None, keep: bool = False) -> None:
        """Look at a gate.

        Args:
            gate: (row, expert).
            path: forced; None chooses by cost.
            keep: the gate serves many calls (a generation): what is copied for a short call is kept.
        """
        self.gate = gate
        self.row_count = len(gate)
        used = gate != 0
        self.width = max(1, int(used.sum(dim=1).max()))
        self.experts: list[int] = used.any(dim=0).nonzero()[:, 0].tolist()
        self.forced = path
        self.keep = keep
        top = gate.abs().topk(self.width, dim=1).indices
        self._top, self._weight = top, gate.gather(1, top)
        self.most, self.busy = self._split(used.sum(dim=1))
        self._picked: dict[tuple[object, ...], Picked] = {}
        self._steps: dict[tuple[tuple[Ranks, ...], int, torch.dtype], Step] = {}
        self._kept: dict[int, Tensor] = {}

    def _split(self, counts: Tensor) -> tuple[int, Tensor | None]:
        """A width for all rows, and the rows (row,) that use more, so that the least work is left."""
        work: dict[int, float] = {}
        for width in range(self.width, 0, -1):  # the first of equal ones is taken: without busy rows
            busy = int((counts > width).sum())
            work[width] = self.row_count * width + _BUSY * busy * (self.width - width)
        best = min(work, key=work.__getitem__)
        return best, (counts > best).nonzero()[:, 0] if best < self.width else None

    def path(self, layers: tuple[Ranks, ...], tokens: int) -> Path:
        """The cheaper way for layers that read one input and see so many tokens a row."""
        if self.forced is not None or self.row_count == 1:
            return self.forced or "all"
        if self._step_of_generation(tokens):
            return "gather"
        side_by_side = sum(ranks.counts[e] for ranks in layers for e in self.experts)
        busy = 0 if self.busy is None else _BUSY * len(self.busy) / self.row_count
        own = (self.most + busy * (self.width - self.most)) * sum(max(ranks.counts) for ranks in layers)
        return "all" if side_by_side * tokens <= own * (tokens + _COPY) else "gather"

    def step(self, layers: tuple[Ranks, ...], tokens: int, dtype: torch.dtype) -> Step:
        """What to do in layers that read one input and see so many tokens a row; looked up once for all like them."""
        key = (layers, tokens, dtype)
        found = self._steps.get(key)
        if found is None:
            path = self.path(layers, tokens)
            if path == "gather" and self._step_of_generation(tokens):
                part = self._part(path, layers, torch.float32, "experts", None)
                found = Step(path, part, by_expert=self._by_expert)
            elif path == "gather" and self.busy is not None:
                most = self._part(path, layers, dtype, "most", None)
                found = Step(path, most, busy_rows=self._part(path, layers, dtype, "busy", self.busy))
            else:
                found = Step(path, self._part(path, layers, dtype, "rows", None))
            self._steps[key] = found
        return found

    def _step_of_generation(self, tokens: int) -> bool:
        return self.keep and tokens == 1 and self.row_count > 1

    @cached_property
    def _by_expert(self) -> ByExpert:
        gate = self.gate[:, self.experts].T
        used = gate != 0
        slots = used.byte().argsort(dim=1, descending=True, stable=True)[:, : int(used.sum(dim=1).max())]
        rows = slots.flatten()
        combine = gate.new_zeros(self.row_count, len(rows))
        combine[rows, torch.arange(len(rows), device=rows.device)] = gate.gather(1, slots).flatten()
        return ByExpert(rows, combine)

    def _part(
        self, path: Path, layers: tuple[Ranks, ...], dtype: torch.dtype, whose: Whose, rows: Tensor | None
    ) -> Taken:
        own = tuple(self.picked(path, (ranks,), dtype, whose) for ranks in layers)
        return Taken(rows, self.picked(path, layers, dtype, whose), own)

    def picked(self, path: Path, layers: tuple[Ranks, ...], dtype: torch.dtype, whose: Whose = "rows") -> Picked:
        """The ranks of layers whose factors lie one after the other.

        Args:
            path: of the layers.
            layers: their ranks.
            dtype: of the gate that the layers multiply with.
            whose: ranks are taken, if gathered.
        """
        key = (path, layers, dtype, whose)
        if key not in self._picked:
            self._picked[key] = self._pick(path, layers, dtype, whose)
        return self._picked[key]

    def _taken(self, whose: Whose) -> tuple[Tensor, Tensor]:
        """Experts (row, expert) of whom ranks are taken, and their gates; rows are experts for `experts`."""
        if whose == "experts":
            column = torch.tensor(self.experts, device=self.gate.device)[:, None]
            return column, torch.ones_like(column, dtype=self.gate.dtype)
        if whose == "busy":
            return self._top[self.busy, self.most :], self._weight[self.busy, self.most :]
        width = self.most if whose == "most" else self.width
        return self._top[:, :width], self._weight[:, :width]

    def _pick(self, path: Path, layers: tuple[Ranks, ...], dtype: torch.dtype, whose: Whose) -> Picked:
        top, weight = self._taken(whose)
        indices: list[Tensor] = []
        gates: list[Tensor] = []
        places: list[slice] = []
        start = 0
        for ranks in layers:
            table, real = ranks.table(self.gate.device)
            if path == "gather":
                indices.append(table[top].flatten(1) + start)
                gates.append((weight[:, :, None] * real[top]).flatten(1))
            else:
                chosen = [e for e in self.experts if ranks.counts[e]]
                parts = [table[e, : ranks.counts[e]] + start for e in chosen]
                indices.append(torch.cat(parts) if parts else table[0, :0])
                gates.append(self.gate[:, [e for e in chosen for _ in range(ranks.counts[e])]])
            first = places[-1].stop if places else 0
            places.append(slice(first, first + gates[-1].shape[1]))
            start += ranks.total
        gate = torch.cat(gates, dim=1)[:, None, :].to(dtype)
        index: Tensor | slice | None = torch.cat(indices, dim=-1).flatten()
        if path == "all" and gate.shape[2] == start:
            index = None
        elif path == "all" and len(layers) == len(self.experts) == 1:
            first = sum(layers[0].counts[: self.experts[0]])
            index = slice(first, first + gate.shape[2])
        return Picked(index, gate, bool((weight == 1).all()) and self._full(path, layers), tuple(places))

    def _full(self, path: Path, layers: tuple[Ranks, ...]) -> bool:
        """Whether each rank taken for a row is one that the row uses."""
        if path == "all":
            return len(self.experts) == 1
        return all(ranks.counts[e] == max(ranks.counts) for ranks in layers for e in self.experts)

    def take(self, factor: Tensor, path: Path, picked: Picked, tokens: int) -> Tensor:
        """The picked rows of a factor, (rank, size) for `all`, (row, rank, size) for `gather`."""
        index = picked.index
        if index is None:
            return factor
        if isinstance(index, slice):
            return factor[index]
        if not self.keep or tokens > 1 or path == "gather":
            return _copied(factor, index, path, len(picked.gate))
        return self._once(factor, lambda: factor.index_select(0, index))

    def of_experts(self, factor: Tensor, picked: Picked) -> Tensor:
        """A factor by expert, (expert, rank, size), kept; on a CPU in float32, in which small products are faster."""
        index = cast(Tensor, picked.index)

        def copied() -> Tensor:
            found = _copied(factor, index, "gather", len(self.experts))
            return found.float() if found.device.type == "cpu" and found.dtype.itemsize < 4 else found

        return self._once(factor, copied)

    def _once(self, factor: Tensor, make: Callable[[], Tensor]) -> Tensor:
        if id(factor) not in self._kept:
            self._kept[id(factor)] = make()
        return self._kept[id(factor)]


def _copied(factor: Tensor, index: Tensor, path: Path, rows: int) -> Tensor:
    taken = factor.index_select(0, index)
    return taken.view(rows, -1, factor.shape[1]) if path == "gather" else taken
