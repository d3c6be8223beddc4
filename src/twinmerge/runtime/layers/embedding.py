"""Gates embeddings, plain or scaled."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twinmerge.runtime.gate import GateSlot
from twinmerge.runtime.layers.layer import FAULTS, GatedLayer, computes, simple, untouched
from twinmerge.tensors.low_rank import LowRank
from twinmerge.tensors.parts import Part
from twinmerge.twin.plan import Kind


class GatedEmbedding(GatedLayer):
    """nn.Embedding, weight (rows, out): ranks of each token's row are looked up, then expanded by `down`."""

    kind: ClassVar[Kind] = "embedding"
    table: Tensor
    """(rows, rank)."""

    def __init__(
        self, shared: nn.Module, parts: Mapping[str, Mapping[int, Part]], experts: int, slot: GateSlot, name: str = ""
    ) -> None:
        """Wrap an embedding and find out what its rows are multiplied with, such as Gemma's."""
        super().__init__(shared, parts, experts, slot, name)
        self.scale = 1.0 if untouched(shared, nn.Embedding) else _scale(shared)

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Embeddings of torch, and others that give a row times one number for all."""
        if untouched(module, nn.Embedding):
            return module.max_norm is None
        if not simple(module, 2) or not isinstance(module, nn.Embedding):
            return False
        weight = module.weight
        ids = torch.arange(min(4, len(weight)), device=weight.device)
        return computes(module, lambda x: F.embedding(x, weight) * _scale(module), (ids, ids[None]))

    def _add_factors(self, factors: Mapping[int, LowRank]) -> None:
        super()._add_factors(factors)
        self.register_buffer("table", self.up.T.contiguous(), persistent=False)
        del self.up

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, ...) indices -> (batch, ..., out); ids shared by the batch, (1, ...), get a row for every gate."""
        y: Tensor = self.shared(ids)
        context = self.slot.context
        if context is None or not (self.has_factors or self.sparse):
            return y
        rows = max(len(ids), len(context.gate)) if len(ids) == 1 and not context.packed else len(ids)
        if len(y) < rows:
            ids, y = ids.expand(rows, *ids.shape[1:]), y.repeat(rows, *(1,) * ids.ndim)
        if self.has_factors:
            layers, size = (self.ranks,), y.shape[-1]
            ids_of_row = ids.reshape(len(context.gate), -1)
            tokens = ids_of_row.shape[1]
            path = context.path(layers, tokens)
            picked = context.picked(path, layers, y.dtype)
            down = context.take(self.projection.down, path, picked, tokens)
            if picked.index is None or isinstance(picked.index, slice):
                hidden = F.embedding(ids_of_row, self.table)
                hidden = hidden if picked.index is None else hidden[..., picked.index]
            else:
                columns = picked.index.view(len(picked.gate) if path == "gather" else 1, 1, picked.gate.shape[2])
                hidden = self.table[ids_of_row[:, :, None], columns]
            hidden = hidden * (picked.gate if self.scale == 1 else picked.gate * self.scale)
            if path == "gather":
                y.view(*ids_of_row.shape, size).baddbmm_(hidden, down)
            else:
                y.view(-1, size).addmm_(hidden.flatten(0, 1), down)
        for index, matrix in self.used_sparse(context):
            weight = self.scale * context.column(index, rows, ids.ndim + 1)
            y += F.embedding(ids, matrix.to_dense()) * weight.to(y.dtype)
        return y

    def own_factors(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """All experts' (rank, rows), times the gate (expert,), and (rank, out), in the gate's dtype."""
        counts = torch.tensor(self.ranks.counts, device=gate.device)
        return self.table.T.to(gate) * gate.repeat_interleave(counts)[:, None], self.projection.down.to(gate)


def _scale(module: Any) -> float:
    """What an embedding multiplies its rows with, by its largest entry; not a number where it cannot be told."""
    weight = module.weight
    ids = torch.arange(min(4, len(weight)), device=weight.device)
    rows = F.embedding(ids, weight.detach()).flatten()
    try:
        with torch.no_grad():
            found = module(ids).flatten()
    except FAULTS:
        return float("nan")
    largest = int(rows.abs().argmax())
    return float(found[largest].double() / rows[largest].double()) if found.shape == rows.shape else float("nan")
