"""Knows gated layers: a shared layer plus every expert's exclusive part, exact for a batch of different gates.

    y = x W_s^T + b_s + sum_t gate_t * ((x down_t^T) up_t^T) + sum_t gate_t * db_t        (METHOD §5)

The factors of all experts lie side by side, so the sum over experts is two matrix products with the gate, repeated over
the ranks, multiplied in between. Nothing is materialised; a layer knows no router.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twinmerge.errors import ArtifactError, GateError
from twinmerge.tensors.low_rank import LowRank
from twinmerge.tensors.sparse import Sparse
from twinmerge.twin.exclusive import Exclusive
from twinmerge.twin.plan import Kind


class GateContext:
    """The gate of one forward pass, (batch, expert), as the layers need it."""

    def __init__(self, gate: Tensor) -> None:
        """Hold a gate; rows are inputs, or tokens where a layer sees packed tokens."""
        self.gate = gate
        self._cache: dict[tuple[int, int], Tensor] = {}

    def rows(self, count: int) -> Tensor:
        """The gate for `count` rows, (count, expert): repeated for beams, heads or packed tokens of each input.

        Raises:
            GateError: if `count` is no multiple of the gate's rows.
        """
        if count == len(self.gate):
            return self.gate
        if count % len(self.gate):
            raise GateError(f"a gate of {len(self.gate)} rows cannot serve a layer's {count} rows; it must divide them")
        return self.gate.repeat_interleave(count // len(self.gate), dim=0)

    def over_ranks(self, count: int, expert_of_rank: Tensor) -> Tensor:
        """The gate of every rank's expert, (count, rank); kept, as most layers share their ranks' experts."""
        key = (count, id(expert_of_rank))
        if key not in self._cache:
            self._cache[key] = self.rows(count)[:, expert_of_rank]
        return self._cache[key]


class GateSlot(threading.local):
    """Where one model's layers find the gate of the call under way; each thread has its own."""

    context: GateContext | None = None

    @contextmanager
    def use(self, gate: Tensor | None) -> Iterator[None]:
        """Run a forward pass with `gate`, None for the shared expert alone."""
        before, self.context = self.context, None if gate is None else GateContext(gate)
        try:
            yield
        finally:
            self.context = before


class GatedLayer(nn.Module):
    """A shared layer, and references to the exclusive parts of all experts."""

    matrix: ClassVar[str] = "weight"
    shared: Any
    """An nn.Module of whatever class; what its kind of layer has is read from it."""
    up: Tensor
    down: Tensor
    expert_of_rank: Tensor

    def __init__(
        self, shared: nn.Module, parts: Mapping[str, Mapping[int, Exclusive]], experts: int, slot: GateSlot
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
        self.sparse: dict[int, str] = {}
        for name, by_expert in parts.items():
            factors = {e: part for e, part in by_expert.items() if isinstance(part, LowRank)}
            vectors = {e: part for e, part in by_expert.items() if isinstance(part, Tensor)}
            if factors:
                self._add_factors(factors)
            if vectors:
                self._add_vectors(name, vectors, getattr(shared, name))
            for index, part in by_expert.items():
                if isinstance(part, Sparse):
                    self._add_sparse(index, part)

    def __getattr__(self, name: str) -> Any:
        """What this layer does not have is the shared layer's: models read `weight`, `in_features`, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("shared"), name)

    def _add_factors(self, factors: Mapping[int, LowRank]) -> None:
        self.has_factors = True
        order = sorted(factors)
        ranks = [torch.full((factors[e].rank,), e) for e in order]
        self.register_buffer("up", torch.cat([factors[e].up for e in order], dim=1), persistent=False)
        self.register_buffer("down", torch.cat([factors[e].down for e in order]), persistent=False)
        self.register_buffer("expert_of_rank", torch.cat(ranks), persistent=False)

    def _add_vectors(self, name: str, vectors: Mapping[int, Tensor], like: Tensor) -> None:
        stacked = torch.zeros(self.experts, *like.shape, dtype=like.dtype)
        for index, vector in vectors.items():
            stacked[index] = vector
        self.register_buffer(f"exclusive_{name}", stacked, persistent=False)

    def _add_sparse(self, index: int, part: Sparse) -> None:
        name = f"sparse_{index}"
        rows, columns = part.shape
        flat = part.indices.long()
        pointers = torch.searchsorted(flat, torch.arange(rows + 1) * columns)
        for leaf, tensor in (("pointers", pointers), ("columns", flat % columns), ("values", part.values)):
            self.register_buffer(f"{name}_{leaf}", tensor, persistent=False)
        self.sparse[index] = name
        self.sparse_shape = part.shape

    def _sparse_matrix(self, name: str) -> Tensor:
        pointers, columns, values = (getattr(self, f"{name}_{leaf}") for leaf in ("pointers", "columns", "values"))
        return torch.sparse_csr_tensor(pointers, columns, values, self.sparse_shape, check_invariants=False)

    def exclusive_vector(self, name: str, context: GateContext, like: Tensor) -> Tensor | None:
        """sum_t gate_t * exclusive_t of a 1-D parameter, shaped to add to `like`, (rows, 1.., out)."""
        stacked = self._buffers.get(f"exclusive_{name}")
        if stacked is None:
            return None
        vector = context.rows(len(like)).to(stacked.dtype) @ stacked
        return vector.reshape(len(like), *(1,) * (like.ndim - 2), vector.shape[1])

    def materialized(self, gate: Tensor) -> dict[str, Tensor]:
        """The layer's parameters for one gate (expert,), shared + sum gate * exclusive by name, summed in float32."""
        result = {}
        for name in self.parameters_with_parts:
            value = getattr(self.shared, name).detach()
            total = value if value.dtype == torch.float64 else value.float()
            weights = gate.to(total)
            stacked = self._buffers.get(f"exclusive_{name}")
            if stacked is not None:
                total = total + torch.tensordot(weights, stacked.to(total), dims=1)
            if name == self.matrix and self.has_factors:
                scaled = self.up.to(total) * weights[self.expert_of_rank]
                total = total + (scaled @ self.down.to(total)).reshape(total.shape)
            if name == self.matrix:
                for index, sparse in self.sparse.items():
                    difference = self._sparse_matrix(sparse).to_dense().to(total)
                    total = total + weights[index] * difference.reshape(total.shape)
            result[name] = total.to(value.dtype)
        return result


class GatedLinear(GatedLayer):
    """nn.Linear, weight (out, in)."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ..., in) -> (batch, ..., out)."""
        y: Tensor = self.shared(x)
        context = self.slot.context
        if context is None:
            return y
        flat = y.view(-1, y.shape[-1])
        if self.has_factors:
            hidden = _times_gate(self.project(x), context, self.expert_of_rank)
            flat = torch.addmm(flat, hidden.reshape(-1, hidden.shape[-1]), self.expand())
        for index, name in self.sparse.items():
            weight = context.rows(len(x))[:, index].reshape(-1, *(1,) * (x.ndim - 1))
            flat = flat + self.sparse_product((x * weight).reshape(-1, x.shape[-1]), self._sparse_matrix(name))
        y = flat.view_as(y)
        bias = self.exclusive_vector("bias", context, y)
        return y if bias is None else y + bias

    def project(self, x: Tensor) -> Tensor:
        """Onto the ranks, (..., in) -> (..., rank)."""
        return F.linear(x, self.down)

    def expand(self) -> Tensor:
        """From the ranks, (rank, out)."""
        up: Tensor = self.up.T
        return up

    @staticmethod
    def sparse_product(x: Tensor, matrix: Tensor) -> Tensor:
        """X (tokens, in) times a sparse difference (out, in), transposed."""
        return (matrix @ x.T).T


class GatedConv1D(GatedLinear):
    """Transformers' Conv1D, weight (in, out)."""

    def project(self, x: Tensor) -> Tensor:
        """Onto the ranks, (..., in) -> (..., rank)."""
        return x @ self.up

    def expand(self) -> Tensor:
        """From the ranks, (rank, out)."""
        down: Tensor = self.down
        return down

    @staticmethod
    def sparse_product(x: Tensor, matrix: Tensor) -> Tensor:
        """X (tokens, in) times a sparse difference (in, out)."""
        return (matrix.to_dense().T @ x.T).T


class GatedEmbedding(GatedLayer):
    """nn.Embedding, weight (rows, out): rows of `up` are gathered, then expanded by `down`."""

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, ...) indices -> (batch, ..., out); ids shared by the batch, (1, ...), get a row for every gate."""
        y: Tensor = self.shared(ids)
        context = self.slot.context
        if context is None or not (self.has_factors or self.sparse):
            return y
        rows = max(len(ids), len(context.gate)) if len(ids) == 1 else len(ids)
        if self.has_factors:
            gathered = F.embedding(ids, self.up).expand(rows, *ids.shape[1:], -1)
            y = y + _times_gate(gathered, context, self.expert_of_rank) @ self.down
        for index, name in self.sparse.items():
            difference = self._sparse_matrix(name).to_dense()
            weight = context.rows(rows)[:, index].reshape(-1, *(1,) * ids.ndim)
            y = y + F.embedding(ids, difference) * weight.to(y.dtype)
        return y


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
        if self.has_factors:
            down = self.down.reshape(-1, *layer.weight.shape[1:])
            hidden = convolve(x, down, None, layer.stride, layer.padding, layer.dilation)
            hidden = hidden * context.over_ranks(len(x), self.expert_of_rank).to(x.dtype).reshape(len(x), -1, *spread)
            y = y + convolve(hidden, self.up.reshape(*self.up.shape, *spread))
        for index, name in self.sparse.items():
            weight = self._sparse_matrix(name).to_dense().reshape(layer.weight.shape)
            gate = context.rows(len(x))[:, index].to(x.dtype).reshape(-1, 1, *spread)
            y = y + gate * convolve(x, weight, None, layer.stride, layer.padding, layer.dilation)
        bias = self.exclusive_vector("bias", context, y.flatten(2).mT)
        return y if bias is None else y + bias.reshape(len(y), -1, *spread)


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
        weights = weight.expand(batch, *weight.shape)
        if self.has_factors:
            scaled = self.up * context.over_ranks(batch, self.expert_of_rank).to(x.dtype)[:, None, :]
            weights = weights + (scaled @ self.down).reshape(weights.shape)
        for index, name in self.sparse.items():
            difference = self._sparse_matrix(name).to_dense().reshape(weight.shape)
            weights = weights + gate[:, index].reshape(-1, *(1,) * weight.ndim) * difference
        convolve = F.conv2d if x.ndim == 4 else F.conv1d
        packed, filters = x.reshape(1, -1, *x.shape[2:]), weights.reshape(-1, *weight.shape[1:])
        y = convolve(packed, filters, None, layer.stride, layer.padding, layer.dilation, layer.groups * batch)
        y = y.reshape(batch, -1, *y.shape[2:])
        if layer.bias is not None:
            bias = self.exclusive_vector("bias", context, y.flatten(2).mT)
            y = y + (layer.bias if bias is None else layer.bias + bias.reshape(batch, -1)).reshape(
                -1, y.shape[1], *(1,) * (y.ndim - 2)
            )
        return y


class GatedNorm(GatedLayer):
    """LayerNorm and RMSNorm of any model: gamma(x) = gamma_s + sum gate * dgamma, likewise beta."""

    def __init__(self, shared: Any, parts: Mapping[str, Mapping[int, Exclusive]], experts: int, slot: GateSlot) -> None:
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
        normalised = self.normalise(x)
        gamma = self.shared.weight
        extra = self.exclusive_vector("weight", context, x)
        gamma = self.offset + gamma if extra is None else self.offset + gamma + extra
        y = normalised * gamma
        beta = getattr(self.shared, "bias", None)
        if beta is not None:
            extra = self.exclusive_vector("bias", context, x)
            y = y + (beta if extra is None else beta + extra)
        return y

    def normalise(self, x: Tensor) -> Tensor:
        """The layer without its affine part."""
        shape = tuple(self.shared.weight.shape)
        if isinstance(self.shared, nn.LayerNorm):
            return F.layer_norm(x, shape, None, None, self.shared.eps)
        return F.rms_norm(x.float(), shape, None, rms_epsilon(self.shared)).to(x.dtype)


def rms_epsilon(layer: nn.Module) -> float:
    """The epsilon of an RMSNorm, whatever its class calls it."""
    return float(getattr(layer, "variance_epsilon", getattr(layer, "eps", None) or 1e-6))


def _times_gate(hidden: Tensor, context: GateContext, expert_of_rank: Tensor) -> Tensor:
    """(batch, ..., rank) times the gate of each rank's expert."""
    gate = context.over_ranks(len(hidden), expert_of_rank).to(hidden.dtype)
    return hidden * gate.reshape(len(hidden), *(1,) * (hidden.ndim - 2), hidden.shape[-1])


LAYERS: Mapping[Kind, type[GatedLayer]] = {
    "linear": GatedLinear,
    "conv1d": GatedConv1D,
    "conv": GatedConv,
    "grouped_conv": GatedGroupedConv,
    "embedding": GatedEmbedding,
    "vector": GatedNorm,
}
