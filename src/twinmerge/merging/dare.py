"""Merges experts by DARE: drop most of each task vector at random, rescale the rest (arXiv:2311.03099)."""

from __future__ import annotations

import torch
from torch import Tensor

from twinmerge.merging.method import Chunk, Density, Normalized, Scaled, Scaling, Seed, merge_method, of_expert
from twinmerge.merging.statistics import Statistics
from twinmerge.merging.ties import elect
from twinmerge.tensors.sparse import drop_mask


class _Dare(Scaled, Normalized):
    """An entry's draw depends on seed, expert, tensor and entry alone."""

    density: Density = 0.2
    rescale: bool = True
    """Divide what is kept by the density, so that the expected value of every entry stays what it was."""
    seed: Seed = 0

    def dropped(self, chunk: Chunk, expert: str) -> tuple[Tensor, Tensor, float]:
        """An expert's task vector, 1 where its entries are kept and 0 elsewhere, and the factor of what is kept."""
        vector, density = chunk.task_vector(expert), of_expert(self.density, expert)
        stop = chunk.at + vector.numel()
        kept = drop_mask(stop, density, self.seed, expert, chunk.tensor, chunk.at).logical_not_()
        weight = of_expert(self.weight, expert)
        kept = kept.view(torch.uint8).view(vector.shape).to(vector)
        return vector, kept, weight / density if self.rescale else weight


@merge_method("dare_linear", paper="arXiv:2311.03099")
class DareLinear(_Dare):
    """Drop and rescale, then task arithmetic."""

    scaling: Scaling = 0.3

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The base and what is kept of the task vectors, added up in float32."""
        base = chunk.base_value()
        change = torch.zeros_like(base, dtype=torch.float32)
        for expert in chunk.names:
            vector, kept, factor = self.dropped(chunk, expert)
            change.addcmul_(vector, kept, value=factor)
        total = sum(self.weights(chunk.names).values()) if self.normalize else 1.0
        return change.double().mul_(self.factor / total).add_(base)


@merge_method("dare_ties", paper="arXiv:2311.03099, arXiv:2306.01708")
class DareTies(_Dare):
    """Drop and rescale in the place of trimming, then elect signs and average what agrees."""

    normalize: bool = True

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The base and the elected mean."""
        vectors = {}
        for expert in chunk.names:
            vector, kept, factor = self.dropped(chunk, expert)
            vectors[expert] = vector.mul_(kept).mul_(factor)
        elected = elect(vectors, self.weights(chunk.names), normalize=self.normalize)
        return elected.double().mul_(self.factor).add_(chunk.base_value())
