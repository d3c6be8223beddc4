"""Gates linear layers: torch's, whose weight is (out, in), and transformers' Conv1D, whose weight is (in, out)."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twinmerge.runtime.gate import GateContext, Merged
from twinmerge.runtime.layers.layer import GatedLayer, computes, samples, simple, untouched
from twinmerge.runtime.paths import ByExpert, Path, Taken
from twinmerge.tensors.low_rank import LowRank
from twinmerge.twin.plan import Kind


class GatedLinear(GatedLayer):
    """nn.Linear, weight (out, in).

    The bias under the gate and the low-rank part are what the large product is added to, in place: no pass over the
    output is paid for them that a plain layer's bias does not pay.
    """

    kind: ClassVar[Kind] = "linear"

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Linear layers of torch, and others that compute the same."""
        if untouched(module, nn.Linear):
            return True
        return simple(module, 2) and _is_linear(module) and not _is_conv1d(module)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ..., in) -> (batch, ..., out)."""
        context = self.slot.context
        if context is None:
            plain: Tensor = self.shared(x)
            return plain
        bias = self.vector("bias", context)
        if not self.has_factors:
            y = None
        elif context.merged is not None:
            return self._by_merged_weights(x, bias, context, context.merged)
        else:
            y = self._low_rank_and_bias(x, bias, context)
        flat, weight = x.reshape(-1, x.shape[-1]), self.shared.weight
        if y is None and bias is not None and bias.ndim == 3:
            y = bias.expand(-1, context.split(x).shape[1], -1).reshape(-1, bias.shape[-1])
            y = torch.addmm(y, flat, self.transposed(weight))
        elif y is None:
            y = self.product(flat, weight, bias)
        elif y.dtype == flat.dtype == weight.dtype:
            y = y.addmm_(flat, self.transposed(weight))
        else:  # under autocast, which casts for new results only
            y = torch.addmm(y, flat, self.transposed(weight))
        if self.sparse:
            self._add_sparse_parts(y, x, context)
        return y.view(*x.shape[:-1], -1)

    def _low_rank_and_bias(self, x: Tensor, bias: Tensor | None, context: GateContext) -> Tensor:
        """Bias + sum_t gate_t * up_t down_t x, (rows * tokens, out)."""
        projection, rows = self.projection, context.split(x)
        tokens = rows.shape[1]
        step = context.step(projection.layers, tokens, x.dtype)
        hidden, more = projection.project(x, rows, step, context)
        if step.by_expert is not None:
            return self._combined(hidden, step.all_rows, step.by_expert, bias, context).to(x.dtype)
        hidden, up = self._own(hidden, step.path, step.all_rows, tokens, context)
        if step.path == "gather":
            if bias is None:
                added = torch.bmm(hidden, up)
            else:
                added = torch.baddbmm(bias.expand(len(hidden), 1, -1), hidden, up)
            if more is not None and step.busy_rows is not None and step.busy_rows.rows is not None:
                own, more_up = self._own(more, step.path, step.busy_rows, tokens, context)
                added.index_add_(0, step.busy_rows.rows, torch.bmm(own, more_up))
            return added.flatten(0, 1)
        hidden = hidden.flatten(0, 1)
        if bias is None:
            return hidden @ up
        if bias.ndim == 3:
            bias = bias.expand(-1, tokens, -1).reshape(-1, bias.shape[-1])
        return torch.addmm(bias, hidden, up)

    def _own(self, hidden: Tensor, path: Path, part: Taken, tokens: int, context: GateContext) -> tuple[Tensor, Tensor]:
        """This layer's ranks of a projection, and its `up` factor for them."""
        return self._ranks_of(hidden, part), context.take(self.up, path, part.own[self.position], tokens)

    def _ranks_of(self, hidden: Tensor, part: Taken) -> Tensor:
        return hidden[..., part.picked.places[self.position]] if len(self.projection.layers) > 1 else hidden

    def _combined(
        self, hidden: Tensor, part: Taken, gathered: ByExpert, bias: Tensor | None, context: GateContext
    ) -> Tensor:
        """(row, out): what the experts give to their slots, added up by the gates."""
        up = context.of_experts(self.up, part.own[self.position])
        given = torch.bmm(self._ranks_of(hidden, part), up).flatten(0, 1)
        combine = gathered.combine.to(given.dtype)
        if bias is None:
            return combine @ given
        rows = (
            bias.flatten(0, -2) if bias.ndim > 1 else bias
        )  # the shared bias of all rows, where no expert has its own
        return torch.addmm(rows.to(given.dtype), combine, given)

    def _add_sparse_parts(self, y: Tensor, x: Tensor, context: GateContext) -> None:
        for index, matrix in self.used_sparse(context):
            weight = context.column(index, len(x), x.ndim).to(x.dtype)
            y += self.sparse_product((x * weight).reshape(-1, x.shape[-1]), matrix)

    def _by_merged_weights(self, x: Tensor, bias: Tensor | None, context: GateContext, merged: Merged) -> Tensor:
        """One plain product for every set of rows under one gate."""
        if len(merged) == 1:
            weight = merged[0][1][self.name]
            return self.product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
        flat = context.split(x)
        order = torch.cat([torch.as_tensor(rows, device=x.device) for rows, _ in merged])
        parts = []
        for rows, weights in merged:
            own = bias if bias is None or bias.ndim == 1 else bias[rows[0], 0]
            part = self.product(flat[rows].flatten(0, 1), weights[self.name], own)
            parts.append(part.view(len(rows), flat.shape[1], -1))
        return torch.cat(parts)[order.argsort()].view(*x.shape[:-1], -1)

    def merged_weight(self, gate: Tensor) -> Tensor:
        """The weight for one gate (expert,), in the shared weight's dtype; only experts with a gate are looked at."""
        context = GateContext(gate[None])
        picked = context.picked("all", (self.ranks,), self.up.dtype)
        up = context.take(self.up, "all", picked, 0) * picked.gate[0].T
        down = context.take(self.own_down(), "all", picked, 0)
        weight = self.add_product(up, down)
        for index, matrix in self.used_sparse(context):
            weight += gate[index].to(weight.dtype) * matrix.to_dense()
        return weight

    def add_product(self, up: Tensor, down: Tensor) -> Tensor:
        """The shared weight plus factors (rank, out), (rank, in)."""
        weight: Tensor = self.shared.weight
        return torch.addmm(weight, up.T, down)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A plain layer's, (tokens, in) -> (tokens, out)."""
        return F.linear(x, weight, bias)

    @staticmethod
    def transposed(weight: Tensor) -> Tensor:
        """A weight as (in, out)."""
        return weight.T

    @staticmethod
    def sparse_product(x: Tensor, matrix: Tensor) -> Tensor:
        """X (tokens, in) times a sparse difference (out, in), transposed."""
        return (matrix @ x.T).T


class GatedConv1D(GatedLinear):
    """Transformers' Conv1D, weight (in, out)."""

    kind: ClassVar[Kind] = "conv1d"

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Whatever computes x W + b."""
        return simple(module, 2) and _is_conv1d(module) and not _is_linear(module)

    @staticmethod
    def pair(part: LowRank) -> tuple[Tensor, Tensor]:
        """The stored matrix is (in, out): its `up` projects, its `down` expands."""
        return part.down, part.up.T.contiguous()

    def low_rank(self, gate: Tensor) -> Tensor:
        """(in, out), as the weight is."""
        return super().low_rank(gate).T

    def add_product(self, up: Tensor, down: Tensor) -> Tensor:
        """The shared weight (in, out) plus factors (rank, out), (rank, in)."""
        weight: Tensor = self.shared.weight
        return torch.addmm(weight, down.T, up)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A plain layer's, (tokens, in) -> (tokens, out)."""
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    @staticmethod
    def transposed(weight: Tensor) -> Tensor:
        """A weight, (in, out) as it is."""
        return weight

    @staticmethod
    def sparse_product(x: Tensor, matrix: Tensor) -> Tensor:
        """X (tokens, in) times a sparse difference (in, out)."""
        return (matrix.to_dense().T @ x.T).T


def _is_linear(module: Any) -> bool:
    weight, bias = module.weight, getattr(module, "bias", None)
    return computes(module, lambda x: F.linear(x, weight, bias), samples(weight.shape[1], weight))


def _is_conv1d(module: Any) -> bool:
    weight, bias = module.weight, getattr(module, "bias", None)
    return computes(module, lambda x: F.linear(x, weight.T, bias), samples(len(weight), weight))
