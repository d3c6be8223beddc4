"""Knows how one tensor of a static merge is computed, stretch by stretch, for every method."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from twinmerge.merging.methods import METHODS, MergeParams, Stats, merge_tensor, run_tensor_prepass
from twinmerge.merging.slerp import Arc
from twinmerge.merging.ties import model_thresholds
from twinmerge.merging.weighted import (
    weighted_average,
    weighted_dare,
    weighted_task_arithmetic,
    weighted_ties,
)
from twinmerge.tensors.difference import task_vector


@dataclass(frozen=True)
class Chunk:
    """The same stretch of one tensor, of every model, flattened, in the dtypes they are stored in."""

    tensor: str
    at: int
    """Which entry of the tensor the first one is."""
    base: Tensor | None
    experts: Mapping[str, Tensor]


Chunks = Callable[[], Iterator[Chunk]]
"""Goes through one tensor from its start; may be called again."""


@runtime_checkable
class Rule(Protocol):
    """How one tensor is merged."""

    @property
    def whole(self) -> bool:
        """Whether the tensor must come as one chunk in its shape."""
        ...

    def measure(self, chunks: Chunks) -> Any:
        """What must be known of the whole tensor before its first chunk is merged."""
        ...

    def merge(self, chunk: Chunk, measured: Any) -> Float[Tensor, "..."]:
        """One chunk of the result, in float32 or wider."""
        ...


@dataclass(frozen=True)
class _Streamed:
    """A rule that takes any chunk and measures nothing first."""

    @property
    def whole(self) -> bool:
        return False

    def measure(self, chunks: Chunks) -> Any:
        return None


@dataclass(frozen=True)
class AverageRule(_Streamed):
    """mergekit's `linear`."""

    weights: Mapping[str, float]
    normalize: bool

    def merge(self, chunk: Chunk, measured: Any) -> Tensor:
        """The weighted average of the models."""
        return weighted_average(chunk.experts, self.weights, normalize=self.normalize)


@dataclass(frozen=True)
class TaskArithmeticRule(_Streamed):
    """mergekit's `task_arithmetic`."""

    weights: Mapping[str, float]
    normalize: bool
    scaling: float

    def merge(self, chunk: Chunk, measured: Any) -> Tensor:
        """The base and the weighted task vectors."""
        return weighted_task_arithmetic(
            _base(chunk), chunk.experts, self.weights, scaling=self.scaling, normalize=self.normalize
        )


@dataclass(frozen=True)
class TiesRule(_Streamed):
    """mergekit's `ties`: density is a fraction of each tensor."""

    weights: Mapping[str, float]
    densities: Mapping[str, float]
    normalize: bool
    scaling: float

    def measure(self, chunks: Chunks) -> Mapping[str, float]:
        """The smallest magnitude kept, by expert."""
        thresholds: dict[str, float] = {}
        for density in sorted(set(self.densities.values())):
            chosen = [name for name, of_expert in self.densities.items() if of_expert == density]
            if density == 1:
                thresholds |= dict.fromkeys(chosen, 0.0)
                continue
            thresholds |= model_thresholds(partial(task_vectors, chunks, chosen), density)
        return thresholds

    def merge(self, chunk: Chunk, measured: Any) -> Tensor:
        """Trimmed by `measured`, elected, added to the base."""
        return weighted_ties(
            _base(chunk),
            chunk.experts,
            self.weights,
            thresholds=measured,
            scaling=self.scaling,
            normalize=self.normalize,
        )


@dataclass(frozen=True)
class DareRule(_Streamed):
    """mergekit's `dare_linear` and `dare_ties`."""

    weights: Mapping[str, float]
    densities: Mapping[str, float]
    normalize: bool
    scaling: float
    rescale: bool
    elect: bool
    seed: int

    def merge(self, chunk: Chunk, measured: Any) -> Tensor:
        """The base and what the draw of (seed, expert, tensor, entry) kept of the task vectors."""
        return weighted_dare(
            _base(chunk),
            chunk.experts,
            self.weights,
            densities=self.densities,
            rescale=self.rescale,
            scaling=self.scaling,
            normalize=self.normalize,
            elect=self.elect,
            seed=self.seed,
            tensor=chunk.tensor,
            at=chunk.at,
        )


@dataclass(frozen=True)
class SlerpRule(_Streamed):
    """mergekit's `slerp`: from `first` at t = 0 to `second` at t = 1."""

    first: str
    second: str
    t: float

    def measure(self, chunks: Chunks) -> Arc:
        """The angle between the two."""
        return Arc.between((chunk.experts[self.first], chunk.experts[self.second]) for chunk in chunks())

    def merge(self, chunk: Chunk, measured: Any) -> Tensor:
        """The point at `t` of the arc."""
        first, second = measured.coefficients(self.t)
        merged = chunk.experts[self.first].double().mul_(first)
        return merged.add_(chunk.experts[self.second].double(), alpha=second)


@dataclass(frozen=True)
class RegistryRule:
    """A method of the registry; those that work entry by entry get chunks, the others whole tensors."""

    params: MergeParams
    stats: Stats | None

    @property
    def whole(self) -> bool:
        """Whether the method looks at the tensor as a whole."""
        return not METHODS[self.params.method].streams

    def measure(self, chunks: Chunks) -> Stats | None:
        """What the method needs of this tensor."""
        return run_tensor_prepass(self.params, lambda: task_vectors(chunks))

    def merge(self, chunk: Chunk, measured: Any) -> Tensor:
        """As `merge_tensor` does."""
        base = _base(chunk)
        vectors = {name: task_vector(base, tensor) for name, tensor in chunk.experts.items()}
        stats = self.stats if measured is None else measured
        return merge_tensor(self.params, base, vectors, name=chunk.tensor, stats=stats, at=chunk.at)


def _base(chunk: Chunk) -> Tensor:
    if chunk.base is None:
        raise ValueError(f"{chunk.tensor!r}: this method needs the base")
    return chunk.base


def task_vectors(chunks: Chunks, chosen: Collection[str] | None = None) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """The tensor's name and its experts' task vectors, chunk by chunk; of the chosen experts alone, if given."""
    for chunk in chunks():
        base = _base(chunk)
        names = chunk.experts if chosen is None else chosen
        yield chunk.tensor, {name: task_vector(base, chunk.experts[name]) for name in names}
