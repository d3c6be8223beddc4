"""Knows gated layers: a shared layer plus every expert's exclusive part, exact for a batch of different gates.

    y = x W_s^T + b_s + sum_t gate_t * ((x down_t^T) up_t^T) + sum_t gate_t * db_t        (METHOD §5)

A layer knows no router and holds no second dense weight; how much work it adds depends on the experts that rows use
(`gating.GateContext`), not on how many there are.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twinmerge.errors import ArtifactError
from twinmerge.runtime.gate import (
    ByExpert,
    GateContext,
    GateSlot,
    Merged,
    Path,
    Picked,
    Ranks,
    Step,
    Taken,
    VectorBank,
)
from twinmerge.tensors.low_rank import LowRank
from twinmerge.tensors.parts import Dense, Part, of_form
from twinmerge.tensors.sparse import Sparse
from twinmerge.twin.plan import Kind


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


class GatedLayer(nn.Module):
    """A shared layer, and references to the exclusive parts of all experts."""

    matrix: ClassVar[str] = "weight"
    shared: Any
    """An nn.Module of whatever class; what its kind of layer has is read from it."""
    up: Tensor
    """(rank, out), the ranks of the first expert, then of the second, ..."""

    def __init__(
        self, shared: nn.Module, parts: Mapping[str, Mapping[int, Part]], experts: int, slot: GateSlot
    ) -> None:
        """Wrap a layer.

        Args:
            shared: the layer of the shared expert; owned, not copied.
            parts: parameter of the layer ("weight", "bias") -> expert's index -> its exclusive part.
            experts: how many experts the gate has.
            slot: where the gate is found.
        """
        super().__init__()
        self.shared = shared
        self.slot = slot
        self.experts = experts
        self.parameters_with_parts = tuple(parts)
        self.has_factors = False
        self.places: dict[str, int] = {}
        """1-D parameters with exclusive parts, and which of `bank` they are."""
        self.sparse: dict[int, str] = {}
        vectors: dict[str, Tensor] = {}
        for name, by_expert in parts.items():
            factors = {e: part for e, part in of_form(by_expert, LowRank).items() if part.rank}
            if factors:
                self._add_factors(factors)
            if whole := of_form(by_expert, Dense):
                vectors[name] = self._stacked(whole, getattr(shared, name))
            for index, entries in of_form(by_expert, Sparse).items():
                self._add_sparse(index, entries)
        if vectors:
            self.places = {name: index for index, name in enumerate(vectors)}
            shared_vectors = torch.cat([getattr(shared, name).detach() for name in vectors])
            sizes = [rows.shape[1] for rows in vectors.values()]
            self.bank = VectorBank(shared_vectors, torch.cat(list(vectors.values()), dim=1), sizes)

    def __getattr__(self, name: str) -> Any:
        """What this layer does not have is the shared layer's: models read `weight`, `in_features`, ...

        Looked up by hand: a call reads a few names of every layer, and nn.Module's way costs more than the products of
        a single row.
        """
        own = self.__dict__
        for held in ("_buffers", "_modules"):
            if held in own and name in own[held]:
                return own[held][name]
        if "_modules" in own and "shared" in own["_modules"]:
            return getattr(own["_modules"]["shared"], name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _add_factors(self, factors: Mapping[int, LowRank]) -> None:
        self.has_factors = True
        order = sorted(factors)
        self.ranks = Ranks.of(tuple(factors[e].rank if e in factors else 0 for e in range(self.experts)))
        pairs = [self.pair(factors[e]) for e in order]
        self.register_buffer("up", torch.cat([up for up, _ in pairs]), persistent=False)
        self.projection = Projection(torch.cat([down for _, down in pairs]), (self.ranks,))
        self.position = 0
        """Among the layers of `projection`."""

    @staticmethod
    def pair(part: LowRank) -> tuple[Tensor, Tensor]:
        """An exclusive part's factors as this layer multiplies them: (rank, out), (rank, in)."""
        return part.up.T.contiguous(), part.down

    def _stacked(self, by_expert: Mapping[int, Dense], like: Tensor) -> Tensor:
        stacked = torch.zeros(self.experts, *like.shape, dtype=like.dtype)
        for index, part in by_expert.items():
            stacked[index] = part.values
        return stacked

    def _add_sparse(self, index: int, part: Sparse) -> None:
        name = f"sparse_{index}"
        rows, columns = part.shape
        flat = part.indices.long()
        pointers = torch.searchsorted(flat, torch.arange(rows + 1) * columns)
        for leaf, tensor in (("pointers", pointers), ("columns", flat % columns), ("values", part.values)):
            self.register_buffer(f"{name}_{leaf}", tensor, persistent=False)
        self.sparse[index] = name
        self.sparse_shape = part.shape
        with warnings.catch_warnings():  # torch says once that its CSR tensors are new; here, where one thread loads
            warnings.simplefilter("ignore", UserWarning)
            self._sparse_matrix(name)

    def _sparse_matrix(self, name: str) -> Tensor:
        pointers, columns, values = (getattr(self, f"{name}_{leaf}") for leaf in ("pointers", "columns", "values"))
        return torch.sparse_csr_tensor(pointers, columns, values, self.sparse_shape, check_invariants=False)

    def used_sparse(self, context: GateContext) -> Iterator[tuple[int, Tensor]]:
        """The sparse parts of the experts that some row uses."""
        for index, name in self.sparse.items():
            if index in context.experts:
                yield index, self._sparse_matrix(name)

    def vector(self, name: str, context: GateContext) -> Tensor | None:
        """A 1-D parameter under the gate: (row, 1, size), (size,) where it is the same for all rows, None if absent."""
        index = self.places.get(name)
        if index is None:
            shared: Tensor | None = getattr(self.shared, name, None)
            return shared
        return context.vector(self.bank, index)

    def materialized(self, gate: Tensor) -> dict[str, Tensor]:
        """The layer's parameters for one gate (expert,), shared + sum gate * exclusive by name, summed in float32."""
        result = {}
        for name in self.parameters_with_parts:
            value = getattr(self.shared, name).detach()
            total = value if value.dtype == torch.float64 else value.float()
            weights = gate.to(total)
            if name in self.places:
                total = total + weights @ self.bank.own(self.places[name]).to(total)
            if name == self.matrix and self.has_factors:
                total = total + self.low_rank(weights).reshape(total.shape)
            if name == self.matrix:
                for index, sparse in self.sparse.items():
                    difference = self._sparse_matrix(sparse).to_dense().to(total)
                    total = total + weights[index] * difference.reshape(total.shape)
            result[name] = total.to(value.dtype)
        return result

    def low_rank(self, gate: Tensor) -> Tensor:
        """Sum of gate (expert,) times up @ down, as a matrix (out, in), in the gate's dtype."""
        up, down = self.own_factors(gate)
        return up.T @ down

    def own_factors(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """All experts' (rank, out), times the gate (expert,), and (rank, in), in the gate's dtype."""
        counts = torch.tensor(self.ranks.counts, device=gate.device)
        return self.up.to(gate) * gate.repeat_interleave(counts)[:, None], self.own_down().to(gate)

    def own_down(self) -> Tensor:
        """This layer's part of the projection, (rank, in)."""
        start = sum(ranks.total for ranks in self.projection.layers[: self.position])
        return self.projection.down[start : start + self.ranks.total]


class GatedLinear(GatedLayer):
    """nn.Linear, weight (out, in).

    The bias under the gate and the low-rank part are what the large product is added to, in place: no pass over the
    output is paid for them that a plain layer's bias does not pay.
    """

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
        if context.readers is not None:
            _note_reader(context, self, x)
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
            weight = context.rows(len(x))[:, index].to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
            y += self.sparse_product((x * weight).reshape(-1, x.shape[-1]), matrix)

    def _by_merged_weights(self, x: Tensor, bias: Tensor | None, context: GateContext, merged: Merged) -> Tensor:
        """One plain product for every set of rows under one gate."""
        if len(merged) == 1:
            weight = merged[0][1][id(self)]
            return self.product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
        flat = context.split(x)
        order = torch.cat([torch.as_tensor(rows, device=x.device) for rows, _ in merged])
        parts = []
        for rows, weights in merged:
            own = bias if bias is None or bias.ndim == 1 else bias[rows[0], 0]
            part = self.product(flat[rows].flatten(0, 1), weights[id(self)], own)
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


def _note_reader(context: GateContext, layer: GatedLinear, x: Tensor) -> None:
    """Write down which layers read one input, while a model's first gated pass is watched."""
    readers = context.readers or []
    if readers and context.projected is not None and context.projected[1] is x:
        readers[-1].append(layer)
    else:
        readers.append([layer])
    context.readers = readers


def join_readers(groups: Sequence[Sequence[GatedLinear]]) -> None:
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


def join_banks(layers: Iterable[GatedLayer]) -> None:
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


class GatedEmbedding(GatedLayer):
    """nn.Embedding, weight (rows, out): ranks of each token's row are looked up, then expanded by `down`."""

    table: Tensor
    """(rows, rank)."""

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
        rows = max(len(ids), len(context.gate)) if len(ids) == 1 else len(ids)
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
            hidden = hidden * picked.gate
            if path == "gather":
                y.view(*ids_of_row.shape, size).baddbmm_(hidden, down)
            else:
                y.view(-1, size).addmm_(hidden.flatten(0, 1), down)
        for index, matrix in self.used_sparse(context):
            weight = context.rows(rows)[:, index].reshape(-1, *(1,) * ids.ndim)
            y += F.embedding(ids, matrix.to_dense()) * weight.to(y.dtype)
        return y

    def own_factors(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """All experts' (rank, rows), times the gate (expert,), and (rank, out), in the gate's dtype."""
        counts = torch.tensor(self.ranks.counts, device=gate.device)
        return self.table.T.to(gate) * gate.repeat_interleave(counts)[:, None], self.projection.down.to(gate)


class GatedConv(GatedLayer):
    """nn.Conv1d and nn.Conv2d without groups: the downs are a convolution, the ups a 1x1 convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, ...) -> (batch, out, ...)."""
        y: Tensor = self.shared(x)
        context = self.slot.context
        if context is None:
            return y
        convolve = F.conv2d if x.ndim == 4 else F.conv1d
        layer = self.shared
        spread = (1,) * (x.ndim - 2)
        repeats = context.repeats(len(x))
        picked = context.picked("all", (self.ranks,), x.dtype) if self.has_factors else None
        if picked is not None and picked.gate.shape[2]:
            down = context.take(self.projection.down, "all", picked, 0).reshape(-1, *layer.weight.shape[1:])
            up = context.take(self.up, "all", picked, 0).T
            hidden = convolve(x, down, None, layer.stride, layer.padding, layer.dilation)
            hidden *= picked.gate.repeat_interleave(repeats, dim=0).reshape(len(x), -1, *spread)
            y += convolve(hidden, up.reshape(*up.shape, *spread))
        for index, matrix in self.used_sparse(context):
            gate = context.rows(len(x))[:, index].to(x.dtype).reshape(-1, 1, *spread)
            weight = matrix.to_dense().reshape(layer.weight.shape)
            y += gate * convolve(x, weight, None, layer.stride, layer.padding, layer.dilation)
        if "bias" in self.places:
            y += (_per_row(self.vector("bias", context), repeats) - layer.bias).reshape(-1, y.shape[1], *spread)
        return y


class GatedGroupedConv(GatedLayer):
    """Grouped (depthwise) convolutions: small weights, so each input gets its own, all in one grouped convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, ...) -> (batch, out, ...)."""
        context = self.slot.context
        layer = self.shared
        if context is None:
            shared: Tensor = layer(x)
            return shared
        batch, weight = len(x), layer.weight
        gate = context.rows(batch).to(x.dtype)
        repeats = context.repeats(batch)
        weights = weight.expand(batch, *weight.shape)
        if self.has_factors:
            picked = context.picked("all", (self.ranks,), x.dtype)
            up, down = (context.take(f, "all", picked, 0) for f in (self.up, self.projection.down))
            differences = (up.T * picked.gate) @ down
            weights = weights + differences.repeat_interleave(repeats, dim=0).reshape(weights.shape)
        for index, matrix in self.used_sparse(context):
            difference = matrix.to_dense().reshape(weight.shape)
            weights = weights + gate[:, index].reshape(-1, *(1,) * weight.ndim) * difference
        convolve = F.conv2d if x.ndim == 4 else F.conv1d
        packed, filters = x.reshape(1, -1, *x.shape[2:]), weights.reshape(-1, *weight.shape[1:])
        y = convolve(packed, filters, None, layer.stride, layer.padding, layer.dilation, layer.groups * batch)
        y = y.reshape(batch, -1, *y.shape[2:])
        if layer.bias is not None:
            bias = _per_row(self.vector("bias", context), repeats)
            y += bias.reshape(-1, y.shape[1], *(1,) * (y.ndim - 2))
        return y


class GatedNorm(GatedLayer):
    """LayerNorm and RMSNorm of any model: gamma(x) = gamma_s + sum gate * dgamma, likewise beta."""

    def __init__(self, shared: Any, parts: Mapping[str, Mapping[int, Part]], experts: int, slot: GateSlot) -> None:
        """Wrap a norm and find out what it adds to its weight: 0, or 1 as Gemma does.

        Raises:
            ArtifactError: if the layer is no affine norm of a known form.
        """
        super().__init__(shared, parts, experts, slot)
        weight = shared.weight
        x = torch.linspace(-1, 2, weight.numel(), dtype=torch.float32).reshape(1, -1).to(weight)
        with torch.no_grad():
            beta = getattr(shared, "bias", None)
            found = shared(x) if beta is None else shared(x) - beta
            offsets = [
                o for o in (0.0, 1.0) if torch.allclose(found, self.normalise(x) * (weight + o), atol=1e-2, rtol=1e-2)
            ]
        if not offsets:
            raise ArtifactError(
                f"{type(shared).__name__} is no LayerNorm or RMSNorm that can be gated; report the model class"
            )
        self.offset = offsets[0]

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ..., size) -> the same shape."""
        context = self.slot.context
        if context is None:
            y: Tensor = self.shared(x)
            return y
        gamma, beta = self.vector("weight", context), self.vector("bias", context)
        if isinstance(self.shared, nn.LayerNorm) and len(context.gate) == 1:
            return F.layer_norm(x, self.shared.normalized_shape, gamma, beta, self.shared.eps)
        normalised = self.normalise(x)
        rows = context.split(normalised)
        scale: Any = gamma + self.offset if self.offset and gamma is not None else gamma
        if beta is None:
            return rows.mul_(scale).view(x.shape)
        fits = rows.dtype == beta.dtype  # not under autocast
        rows = torch.addcmul(beta, rows, scale, out=rows) if fits else torch.addcmul(beta, rows, scale)
        return rows.view(x.shape)

    def normalise(self, x: Tensor) -> Tensor:
        """The layer without its affine part."""
        shape = tuple(self.shared.weight.shape)
        if isinstance(self.shared, nn.LayerNorm):
            return F.layer_norm(x, shape, None, None, self.shared.eps)
        wide = x.float()  # by hand: torch's own takes three times as long for a token
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + rms_epsilon(self.shared))).to(x.dtype)


def rms_epsilon(layer: nn.Module) -> float:
    """The epsilon of an RMSNorm, whatever its class calls it."""
    return float(getattr(layer, "variance_epsilon", getattr(layer, "eps", None) or 1e-6))


def _per_row(vector: Any, repeats: int) -> Tensor:
    """A 1-D parameter under the gate, for every row of a layer's input."""
    found: Tensor = vector if vector.ndim == 1 else vector.repeat_interleave(repeats, dim=0)
    return found


LAYERS: Mapping[Kind, type[GatedLayer]] = {
    "linear": GatedLinear,
    "conv1d": GatedConv1D,
    "conv": GatedConv,
    "grouped_conv": GatedGroupedConv,
    "embedding": GatedEmbedding,
    "vector": GatedNorm,
}
