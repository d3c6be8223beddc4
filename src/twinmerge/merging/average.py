"""Merges experts by averaging them (arXiv:2203.05482), or not at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from twinmerge.merging.method import Chunk, Method, Normalized, merge_method
from twinmerge.merging.statistics import Statistics


@merge_method("pretrained", paper="arXiv:2406.15479")
class Pretrained(Method):
    """The base itself, no expert in it."""

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The base."""
        return chunk.base_value()

    def coefficients(self, experts: Collection[str]) -> Mapping[str, float]:
        """No task vector takes part."""
        return dict.fromkeys(experts, 0.0)


@merge_method("average", paper="arXiv:2203.05482")
class Average(Normalized):
    """The mean of the experts: sum_t w_t theta_t, divided by sum_t w_t (METHOD §2)."""

    uses_base = False
    normalize: bool = True

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The weighted sum of the models."""
        weights = self.weights(chunk.names)
        total = sum(weights.values()) if self.normalize else 1.0
        merged = torch.zeros_like(chunk.value(chunk.names[0]))
        for expert, weight in weights.items():
            merged.add_(chunk.value(expert), alpha=weight / total)
        return merged

    def coefficients(self, experts: Collection[str]) -> Mapping[str, float] | None:
        """The weights, if they sum to 1: else the base is multiplied too."""
        weights = self.weights(experts)
        total = sum(weights.values())
        if not self.normalize and abs(total - 1) > 1e-12:
            return None
        return {expert: weight / total for expert, weight in weights.items()}
