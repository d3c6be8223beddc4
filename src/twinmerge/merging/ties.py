"""Merges experts by TIES: trim small changes, elect a sign, average what has it (arXiv:2306.01708)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from jaxtyping import Float32
from torch import Tensor

from twinmerge.merging.method import Chunk, Chunks, Density, Normalized, Scaled, merge_method, of_expert
from twinmerge.merging.order import kth_largest
from twinmerge.merging.statistics import Statistics
from twinmerge.tensors.sparse import kept_count


@merge_method("ties", paper="arXiv:2306.01708")
class Ties(Scaled, Normalized):
    """theta_0 + lambda times the elected mean of the trimmed task vectors (METHOD §2, algorithm 1 of the paper)."""

    density: Density = 0.2
    scope: Literal["model", "tensor"] = "model"
    """What density is a fraction of."""
    normalize: bool = True

    def prepass(self, model: Chunks) -> Mapping[str, float] | None:
        """The smallest magnitude kept of the whole model, by expert."""
        return thresholds(model, self.density) if self.scope == "model" else None

    def measure(self, tensor: Chunks, statistics: Statistics) -> Mapping[str, float] | None:
        """The smallest magnitude kept of the tensor, by expert."""
        return thresholds(tensor, self.density) if self.scope == "tensor" else None

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The base and the elected mean, added up in float32."""
        smallest = statistics.model if statistics.tensor is None else statistics.tensor
        if smallest is None:
            raise ValueError("ties needs its thresholds, which its pre-pass finds")
        vectors, weights = {}, self.weights(chunk.names)
        for expert in chunk.names:
            vector = chunk.task_vector(expert)
            vector.mul_(torch.ge(vector.abs(), smallest.get(expert, 0.0), out=torch.empty_like(vector)))
            vectors[expert] = vector.mul_(weights[expert])
        elected = elect(vectors, weights, normalize=self.normalize)
        return elected.double().mul_(self.factor).add_(chunk.base_value())


def elect(
    vectors: Mapping[str, Float32[Tensor, "*shape"]], weights: Mapping[str, float], *, normalize: bool
) -> Float32[Tensor, "*shape"]:
    """Elect each entry's sign by the sum over experts, then add up the experts that have that sign.

    An entry whose sum is zero has no sign and stays zero, as in the paper; zeros of an expert take no part.

    Args:
        vectors: weighted, trimmed or dropped task vectors.
        weights: what they were multiplied with.
        normalize: divide each entry by the weights of the experts that have its sign: with equal weights, their mean.
    """
    names = sorted(vectors)
    elected = sum((vectors[name] for name in names[1:]), start=vectors[names[0]]).sign()
    total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
    for name in names:
        agrees = vectors[name] * elected
        torch.gt(agrees, 0, out=agrees)
        total.addcmul_(vectors[name], agrees)
        divisor.add_(agrees, alpha=weights[name])
    return total.div_(divisor.masked_fill_(divisor == 0, 1.0)) if normalize else total


def thresholds(chunks: Chunks, density: float | Mapping[str, float]) -> Mapping[str, float]:
    """The `kept_count`-th largest magnitude of each expert's task vector, over all chunks; see `kth_largest`.

    Entries equal to it are all kept.

    Args:
        chunks: gone through twice; not at all where every density is 1.
        density: fraction of the whole task vector kept, in (0, 1]; an expert of which everything is kept is left out.

    Raises:
        RecipeError: if `density` is outside (0, 1].
    """

    def magnitudes() -> Iterator[tuple[str, Float32[Tensor, " entries"]]]:
        if all(kept == 1 for kept in (density.values() if isinstance(density, Mapping) else [density])):
            return
        for chunk in chunks():
            for expert in chunk.names:
                if of_expert(density, expert) != 1:
                    yield expert, chunk.task_vector(expert).abs_()

    return kth_largest(magnitudes, lambda expert, numel: kept_count(numel, of_expert(density, expert)))
