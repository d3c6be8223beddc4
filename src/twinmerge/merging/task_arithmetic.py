"""Merges experts by adding up what each of them learned (arXiv:2212.04089)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from twinmerge.merging.method import Chunk, Normalized, Scaled, Scaling, merge_method
from twinmerge.merging.statistics import Statistics


@merge_method("task_arithmetic", paper="arXiv:2212.04089")
class TaskArithmetic(Scaled, Normalized):
    """theta_0 + lambda sum_t w_t tau_t (METHOD §2); lambda is about 0.3 in the paper."""

    scaling: Scaling = 0.3

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The base and the weighted task vectors."""
        base = chunk.base_value()
        change = torch.zeros_like(base)
        for expert, weight in self.weights(chunk.names).items():
            change.add_(chunk.task_vector(expert, torch.float64), alpha=weight)
        return change.mul_(self._factor_of(chunk.names)).add_(base)

    def coefficients(self, experts: Collection[str]) -> Mapping[str, float]:
        """The scaled weights."""
        return {expert: self._factor_of(experts) * weight for expert, weight in self.weights(experts).items()}

    def _factor_of(self, experts: Collection[str]) -> float:
        return self.factor / sum(self.weights(experts).values()) if self.normalize else self.factor
