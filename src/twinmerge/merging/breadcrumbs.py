"""Merges experts by Model Breadcrumbs: leave out small entries and the largest (arXiv:2312.06795)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.merging.method import (
    Chunk,
    Chunks,
    Density,
    Each,
    Normalized,
    Scaled,
    Scaling,
    merge_method,
    of_expert,
)
from twinmerge.merging.order import kth_largest
from twinmerge.merging.statistics import Statistics
from twinmerge.merging.ties import elect
from twinmerge.tensors.sparse import kept_count

Share = Annotated[float | dict[str, float], Each(Annotated[float, Field(ge=0, lt=1, description="in [0, 1)")])]


class _Breadcrumbs(Scaled, Normalized):
    """Of each tensor and expert the `density` below the top `gamma` is kept."""

    density: Density = 0.1
    gamma: Share = 0.01
    """The fraction of largest entries left out; less where density and it are more than everything."""

    def measure(self, tensor: Chunks, statistics: Statistics) -> Mapping[str, tuple[float, float]]:
        """The smallest and the largest magnitude kept of the tensor, by expert."""

        def magnitudes() -> Iterator[tuple[str, Tensor]]:
            for chunk in tensor():
                for expert in chunk.names:
                    yield expert, chunk.task_vector(expert).abs_()

        def left_out(expert: str, numel: int) -> int:
            kept = kept_count(numel, of_expert(self.density, expert))
            return min(int(of_expert(self.gamma, expert) * numel), numel - kept)

        largest = kth_largest(magnitudes, lambda expert, numel: left_out(expert, numel) + 1)
        smallest = kth_largest(
            magnitudes,
            lambda expert, numel: left_out(expert, numel) + kept_count(numel, of_expert(self.density, expert)),
        )
        return {expert: (smallest[expert], largest[expert]) for expert in largest}

    def trimmed(self, chunk: Chunk, statistics: Statistics) -> dict[str, Tensor]:
        """Weighted task vectors of what is kept."""
        vectors = {}
        for expert, weight in self.weights(chunk.names).items():
            vector, (smallest, largest) = chunk.task_vector(expert), statistics.tensor[expert]
            magnitude = vector.abs()
            vectors[expert] = vector.mul_((magnitude >= smallest) & (magnitude <= largest)).mul_(weight)
        return vectors


@merge_method("breadcrumbs", paper="arXiv:2312.06795")
class Breadcrumbs(_Breadcrumbs):
    """theta_0 + lambda times the sum of what is kept of the task vectors."""

    scaling: Scaling = 0.3

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The base and what is kept, added up in float32."""
        total = sum(self.weights(chunk.names).values()) if self.normalize else 1.0
        change = torch.stack(list(self.trimmed(chunk, statistics).values())).sum(0)
        return change.double().mul_(self.factor / total).add_(chunk.base_value())


@merge_method("breadcrumbs_ties", paper="arXiv:2312.06795, arXiv:2306.01708")
class BreadcrumbsTies(_Breadcrumbs):
    """theta_0 + lambda times the sum of what is kept, of each entry only where experts have its elected sign."""

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The base and the elected sum."""
        elected = elect(self.trimmed(chunk, statistics), self.weights(chunk.names), normalize=self.normalize)
        return elected.double().mul_(self.factor).add_(chunk.base_value())
