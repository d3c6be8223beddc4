"""Wraps a shared layer with every expert's exclusive part: what gated layers of all kinds have in common.

    y = x W_s^T + b_s + sum_t gate_t * ((x down_t^T) up_t^T) + sum_t gate_t * db_t        (METHOD §5)

A layer knows no router and holds no second dense weight; how much work it adds depends on the experts that rows use
(`gate.GateContext`), not on how many there are.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from twinmerge.runtime.banks import Projection, VectorBank
from twinmerge.runtime.gate import GateContext, GateSlot
from twinmerge.runtime.paths import Ranks
from twinmerge.tensors.low_rank import LowRank
from twinmerge.tensors.parts import Dense, Part, of_form
from twinmerge.tensors.sparse import Sparse
from twinmerge.twin.plan import Kind


class GatedLayer(nn.Module):
    """A shared layer, and references to the exclusive parts of all experts."""

    matrix: ClassVar[str] = "weight"
    kind: ClassVar[Kind]
    """Of its matrix; what else it has are vectors."""
    leaves: ClassVar[frozenset[str]] = frozenset({"weight", "bias"})
    """What it gates."""
    shared: Any
    """An nn.Module of whatever class; what its kind of layer has is read from it."""
    up: Tensor
    """(rank, out), the ranks of the first expert, then of the second, ..."""

    def __init__(
        self, shared: nn.Module, parts: Mapping[str, Mapping[int, Part]], experts: int, slot: GateSlot, name: str = ""
    ) -> None:
        """Wrap a layer.

        Args:
            shared: the layer of the shared expert; owned, not copied.
            parts: parameter of the layer ("weight", "bias") -> expert's index -> its exclusive part.
            experts: how many experts the gate has.
            slot: where the gate is found.
            name: of the layer in its model.
        """
        super().__init__()
        self.shared = shared
        self.name = name
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

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Whether this is what a module computes: known by its class, or tried on numbers."""
        raise NotImplementedError

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
        return self.bank.under(context, index)

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


def per_row(vector: Any, repeats: int) -> Tensor:
    """A 1-D parameter under the gate, for every row of a layer's input."""
    found: Tensor = vector if vector.ndim == 1 else vector.repeat_interleave(repeats, dim=0)
    return found


def untouched(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether a module computes what one of some classes does: nothing overrides or hooks into its forward."""
    known = any(isinstance(module, cls) and type(module).forward is cls.forward for cls in classes)
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return known and not hooked and "weight" in module._parameters


def simple(module: nn.Module, ndim: int) -> bool:
    """Whether a module of any class has a weight of so many axes, perhaps a bias and numbers, and nothing else."""
    own, weight = module._parameters, module._parameters.get("weight")
    plain = weight is not None and weight.ndim == ndim and weight.is_floating_point() and not weight.is_meta
    alone = {name for name, value in own.items() if value is not None} <= {"weight", "bias"} and not module._modules
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return plain and alone and not hooked and all(b is None or b.ndim == 0 for b in module._buffers.values())


_FLOAT32 = torch.finfo(torch.float32).eps
"""Some modules compute in float32 whatever they are given."""
FAULTS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, NotImplementedError)
"""What a module may raise when it is tried on inputs that are not its own."""


def computes(
    module: nn.Module, expected: Callable[[Tensor], Tensor], inputs: Iterable[Tensor], precision: float = _FLOAT32
) -> bool:
    """Whether a module gives what is expected, to the precision of its weights or a coarser one."""
    for x in inputs:
        try:
            with torch.no_grad():
                want, found = expected(x), module(x)
        except FAULTS:
            return False
        if not isinstance(found, Tensor) or found.shape != want.shape or found.dtype != want.dtype:
            return False
        tolerance = 16 * max(torch.finfo(want.dtype).eps, precision) * float(want.abs().max())
        if not float((found - want).abs().max()) <= tolerance:
            return False
    return True


def samples(size: int, like: Tensor) -> Iterator[Tensor]:
    """Inputs (2, 3, size) of several magnitudes."""
    x = torch.arange(6 * size, dtype=torch.float64).add(1).mul(0.7).sin().reshape(2, 3, size)
    for magnitude in (0.01, 1.0, 100.0):
        yield (magnitude * x).to(like)
