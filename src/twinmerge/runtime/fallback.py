"""Serves what no fast layer serves, exactly: rows are grouped by gate, and each group runs with merged values.

Any parameter and any float buffer, whatever reads it and however. Costs a pass per distinct gate.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from twinmerge.errors import GateError
from twinmerge.runtime.compose import theta
from twinmerge.runtime.gate import GateSlot
from twinmerge.tensors.parts import Part, unpack

Key = tuple[float, ...]
"""A gate of the experts that have parts here."""


class Fallback(nn.Module):
    """The exclusive parts of parameters and buffers that no fast layer serves."""

    def __init__(self, parts: Mapping[str, Mapping[int, Part]]) -> None:
        """Hold them.

        Args:
            parts: name -> expert's index -> its part.
        """
        super().__init__()
        self.names = tuple(parts)
        self.experts = sorted({expert for by_expert in parts.values() for expert in by_expert})
        self._places: dict[tuple[str, int], tuple[dict[str, str], Any]] = {}
        """(name, expert) -> names of its part's tensors here, and the part's shape."""
        for index, (name, by_expert) in enumerate(parts.items()):
            for expert, part in by_expert.items():
                leaves = {leaf: f"{index}_{expert}_{leaf}" for leaf in part.pack()}
                for leaf, tensor in part.pack().items():
                    self.register_buffer(leaves[leaf], tensor, persistent=False)
                self._places[name, expert] = leaves, part.shape

    def groups(self, gate: Tensor) -> dict[Key, list[int]]:
        """Rows of a gate (batch, expert) that share their merged values; none where no expert in use has a part."""
        found: dict[Key, list[int]] = {}
        for index, row in enumerate(gate[:, self.experts].tolist()):
            found.setdefault(tuple(row), []).append(index)
        return found if any(any(key) for key in found) else {}

    def merged(self, values: Mapping[str, Tensor], key: Key) -> dict[str, Tensor]:
        """Values by name for the gate of a group."""
        by_expert: list[dict[str, Part]] = []
        for expert in self.experts:
            own = {n: place for (n, e), place in self._places.items() if e == expert}
            leaves = {n: {leaf: getattr(self, held) for leaf, held in place[0].items()} for n, place in own.items()}
            by_expert.append({n: unpack(found, own[n][1]) for n, found in leaves.items()})
        return theta({name: values[name] for name in self.names}, by_expert, key)


def with_values(module: nn.Module, values: Mapping[int, Tensor], slot: GateSlot) -> nn.Module:
    """A module like another that shares all of its tensors but some; the other is not touched: calls run side by side.

    Args:
        module: with tied parameters, hooks and whatever refers to its own parts.
        values: by the id of the parameter or buffer whose place they take.
        slot: where the layers of both find the gate.
    """
    memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    for place, value in values.items():
        parameter = isinstance(memo[place], nn.Parameter)
        memo[place] = nn.Parameter(value, requires_grad=False) if parameter else value
    memo[id(slot)] = slot
    made: nn.Module = copy.deepcopy(module, memo)
    return made


def take(values: Mapping[str, Any], rows: Sequence[int], batch: int) -> dict[str, Any] | None:
    """Rows of inputs; None where they are not plainly one row each, such as packed images."""
    tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}
    positions = values.get("position_ids")
    if any(not v.ndim or len(v) != batch for v in tensors.values()) or (positions is not None and positions.ndim > 2):
        return None
    return {k: v[list(rows)] if k in tensors else v for k, v in values.items()}


def join(outputs: Sequence[Any], groups: Sequence[Sequence[int]], whole: bool, pad: int | None = None) -> Any:
    """Outputs of groups of rows as one, in the rows' order.

    Args:
        outputs: of each group: tensors (rows * anything, ...), in mappings and sequences.
        groups: which rows each has.
        whole: whether each group's holds all rows, of which its own are taken.
        pad: what fills up rows (row, length) that differ in length; None refuses them.

    Returns:
        The same structure. What has no rows, such as a cache, is None.

    Raises:
        GateError: if rows differ in length.
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        return _joined(outputs, groups, whole, pad)
    if isinstance(first, Mapping):
        fields = {k: join([one[k] for one in outputs], groups, whole, pad) for k in first}
        kind: Any = type(first)
        return kind(**fields)
    if isinstance(first, list | tuple):
        items = [join(of_all, groups, whole, pad) for of_all in zip(*outputs, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return None


def _joined(outputs: Sequence[Tensor], groups: Sequence[Sequence[int]], whole: bool, pad: int | None) -> Tensor | None:
    batch = sum(len(rows) for rows in groups)
    each = {
        divmod(len(tensor), batch if whole else len(rows)) if tensor.ndim else (0, 1)
        for tensor, rows in zip(outputs, groups, strict=True)
    }
    repeats, rest = each.pop()
    if each or rest or not repeats:
        return None
    own = [t.view(-1, repeats, *t.shape[1:]) for t in outputs]
    if whole:
        own = [t[list(rows)] for t, rows in zip(own, groups, strict=True)]
    if len({t.shape[2:] for t in own}) > 1:
        if pad is None or any(t.ndim != 3 for t in own):
            raise GateError("rows of different gates gave outputs of different lengths; ask for them one by one")
        longest = max(t.shape[2] for t in own)
        own = [nn.functional.pad(t, (0, longest - t.shape[2]), value=pad) for t in own]
    order = torch.tensor([row for rows in groups for row in rows], device=own[0].device)
    return torch.cat(own)[order.argsort()].flatten(0, 1)
