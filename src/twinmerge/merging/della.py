"""Merges experts by DELLA: drop entries at random, the smaller of a row the more often (arXiv:2406.11617)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.merging.method import (
    Chunk,
    Density,
    Each,
    Normalized,
    Scaled,
    Scaling,
    Seed,
    merge_method,
    of_expert,
)
from twinmerge.merging.statistics import Statistics
from twinmerge.merging.ties import elect
from twinmerge.tensors.sparse import uniform

HalfWidth = Annotated[float | dict[str, float], Each(Annotated[float, Field(ge=0, lt=0.5, description="in [0, 0.5)")])]


class _Della(Scaled, Normalized):
    """An entry's draw depends on seed, expert, tensor and entry alone."""

    whole = True
    density: Density = 0.4
    epsilon: HalfWidth = 0.15
    """Chances to be kept go from density - epsilon (a row's smallest) to density + epsilon; the paper's is twice it."""
    rescale: bool = True
    """Divide what is kept by its chance, so that the expected value of every entry stays what it was."""
    seed: Seed = 0

    def misfit(self, experts: Collection[str]) -> str | None:
        """Also chances outside of (0, 1)."""
        if fault := super().misfit(experts):
            return fault
        for expert in sorted(experts):
            density, epsilon = of_expert(self.density, expert), of_expert(self.epsilon, expert)
            if density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
                return f"density - epsilon and density + epsilon must be in (0, 1), found {density:g} and {epsilon:g}"
        return None

    def pruned(self, chunk: Chunk) -> dict[str, Tensor]:
        """Weighted task vectors of what is kept."""
        return {e: self._pruned(chunk, e).mul_(weight) for e, weight in self.weights(chunk.names).items()}

    def memory_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        """Ranks in int64, chances and draws in float64, of one expert."""
        return 48 * torch.Size(shape).numel()

    def _pruned(self, chunk: Chunk, expert: str) -> Tensor:
        vector, density = chunk.task_vector(expert), of_expert(self.density, expert)
        if density == 1:
            return vector
        rows = vector.view(len(vector), -1) if vector.ndim > 1 else vector.view(1, -1)
        rank = rows.abs().argsort(dim=1, stable=True).argsort(dim=1, stable=True).double()
        place = rank / (rows.shape[1] - 1) if rows.shape[1] > 1 else torch.full_like(rank, 0.5)
        chance = density + of_expert(self.epsilon, expert) * (2 * place - 1)
        kept = uniform(rows.numel(), self.seed, expert, chunk.tensor).view(rows.shape) < chance
        pruned = torch.where(kept, rows / chance.float() if self.rescale else rows, 0.0)
        return pruned.view(vector.shape)


@merge_method("della", paper="arXiv:2406.11617")
class Della(_Della):
    """theta_0 + lambda times the elected mean of what is kept of the task vectors."""

    normalize: bool = True

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The base and the elected mean."""
        elected = elect(self.pruned(chunk), self.weights(chunk.names), normalize=self.normalize)
        return elected.double().mul_(self.factor).add_(chunk.base_value())


@merge_method("della_linear", paper="arXiv:2406.11617")
class DellaLinear(_Della):
    """theta_0 + lambda times the sum of what is kept of the task vectors: no election of signs."""

    scaling: Scaling = 0.3

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The base and what is kept, added up in float32."""
        total = sum(self.weights(chunk.names).values()) if self.normalize else 1.0
        change = torch.stack(list(self.pruned(chunk).values())).sum(0)
        return change.double().mul_(self.factor / total).add_(chunk.base_value())
