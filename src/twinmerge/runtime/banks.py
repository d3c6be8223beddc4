"""Lays side by side what one product serves: 1-D parameters of all layers, factors of layers that read one input."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from twinmerge.runtime.gate import GateContext
from twinmerge.runtime.paths import ByExpert, Path, Picked, Ranks, Step


class VectorBank(nn.Module):
    """1-D parameters that have exclusive parts, side by side: one product with the gate serves them all."""

    shared: Tensor
    exclusive: Tensor

    def __init__(self, shared: Tensor, exclusive: Tensor, sizes: Sequence[int]) -> None:
        """Hold them.

        Args:
            shared: (size,), the shared expert's.
            exclusive: (expert, size).
            sizes: of each parameter, in their order.
        """
        super().__init__()
        self.register_buffer("shared", shared, persistent=False)
        self.register_buffer("exclusive", exclusive, persistent=False)
        self.sizes = list(sizes)

    def own(self, index: int) -> Tensor:
        """One parameter's exclusive parts, (expert, size)."""
        start = sum(self.sizes[:index])
        return self.exclusive[:, start : start + self.sizes[index]]

    def under(self, context: GateContext, index: int) -> Tensor:
        """A parameter under the gate, shared included: (row, 1, size), (size,) for a single row."""
        found = context.vectors.get(id(self))
        if found is None:
            with torch.autocast(self.shared.device.type, enabled=False):  # norms stay in their own precision
                gate, exclusive = context.gate.to(self.shared.dtype), self.exclusive
                if 2 * len(context.experts) <= len(exclusive):  # looked at, not multiplied by 0
                    gate, exclusive = gate[:, context.experts], exclusive[context.experts]
                mixed = torch.addmm(self.shared, gate, exclusive)
            mixed = mixed[0] if context.row_count == 1 else mixed[:, None]
            found = context.vectors[id(self)] = torch.split(mixed, self.sizes, dim=-1)
        return found[index]


class Projection(nn.Module):
    """Onto the ranks: the `down` factors of the layers that read one input, one after the other."""

    down: Tensor

    def __init__(self, down: Tensor, layers: tuple[Ranks, ...]) -> None:
        """Hold them.

        Args:
            down: (rank, in), the ranks of the first layer, then of the second, ...
            layers: the ranks of each.
        """
        super().__init__()
        self.register_buffer("down", down, persistent=False)
        self.layers = layers

    def project(self, x: Tensor, rows: Tensor, step: Step, context: GateContext) -> tuple[Tensor, Tensor | None]:
        """Give (row, token, rank), times the gate, of all rows and of the busy ones; once for all layers that read `x`.

        The ranks, few, come first in the product and tokens second: up to twice as fast as the other way round.

        Args:
            x: the layers' input.
            rows: the same as (row of the gate, token, in).
            step: how these layers take part in the call.
            context: of the call.
        """
        last = context.projected
        if last is not None and last[0] is self and last[1] is x:
            return last[2]
        more = None
        if step.by_expert is not None:
            hidden = self._by_expert(rows, step.by_expert, step.all_rows.picked, context)
        else:
            hidden = self._hidden(rows, step.path, step.all_rows.picked, context)
        if step.busy_rows is not None:
            more = self._hidden(rows[step.busy_rows.rows], step.path, step.busy_rows.picked, context)
        context.projected = (self, x, (hidden, more))
        return hidden, more

    def _hidden(self, rows: Tensor, path: Path, picked: Picked, context: GateContext) -> Tensor:
        down = context.take(self.down, path, picked, rows.shape[1])
        if path == "gather":
            hidden = torch.bmm(down, rows.mT).mT
        else:
            hidden = torch.mm(down, rows.flatten(0, 1).T).T.view(*rows.shape[:2], -1)
        if not picked.ones:
            hidden *= picked.gate
        return hidden

    def _by_expert(self, rows: Tensor, gathered: ByExpert, picked: Picked, context: GateContext) -> Tensor:
        """(expert, slot, rank), without the gate; the row comes first: up to nine times as fast."""
        down = context.of_experts(self.down, picked)
        slots = rows[:, 0].index_select(0, gathered.rows).to(down.dtype)
        hidden = torch.bmm(slots.view(len(down), -1, slots.shape[1]), down.mT)
        return hidden if picked.ones else hidden * picked.gate.to(hidden.dtype)


def join_readers(groups: Sequence[Sequence[Any]]) -> None:
    """Give layers that read one input one projection; layers seen in other company elsewhere keep their own.

    A layer's own `down` is replaced, not copied beside.
    """
    company: dict[int, set[tuple[int, ...]]] = {}
    for group in groups:
        for layer in group:
            company.setdefault(id(layer), set()).add(tuple(id(one) for one in group))
    for group in {tuple(id(one) for one in group): group for group in groups}.values():
        members = tuple(id(one) for one in group)
        alone = all(company[member] == {members} for member in members)
        if len(group) < 2 or len(set(members)) < len(members) or not alone:
            continue
        down = torch.cat([layer.projection.down for layer in group])
        joined = Projection(down, tuple(layer.ranks for layer in group))
        for position, layer in enumerate(group):
            layer.projection, layer.position = joined, position


def join_banks(layers: Iterable[Any]) -> None:
    """Lay the 1-D parameters of all layers of one dtype side by side."""
    with_vectors = [layer for layer in layers if layer.places]
    for dtype in {layer.bank.shared.dtype for layer in with_vectors}:
        chosen = [layer for layer in with_vectors if layer.bank.shared.dtype == dtype]
        bank = VectorBank(
            torch.cat([layer.bank.shared for layer in chosen]),
            torch.cat([layer.bank.exclusive for layer in chosen], 1),
            [size for layer in chosen for size in layer.bank.sizes],
        )
        start = 0
        for layer in chosen:
            layer.places = {name: start + index for name, index in layer.places.items()}
            start += len(layer.bank.sizes)
            layer.bank = bank
