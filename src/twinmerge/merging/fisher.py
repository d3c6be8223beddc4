"""Merges experts by Fisher-weighted averaging (arXiv:2111.09832): each number counts by how much answers hang on it."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.merging.method import CalibratedMean, Chunk, merge_method
from twinmerge.merging.statistics import Statistics


@merge_method("fisher", paper="arXiv:2111.09832")
class Fisher(CalibratedMean):
    """sum_t w_t F_t theta_t / sum_t w_t F_t, F_t being the diagonal of the expert's Fisher information."""

    measurement = "fisher"
    uses_base = False
    floor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-6
    """The least that a number counts, so that what no answer hangs on is averaged."""

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The mean of the experts, entry by entry weighted by their information."""
        merged = total = torch.zeros(())
        for expert, weight in self.weights(chunk.names).items():
            value = chunk.value(expert)
            found = statistics.read(expert, chunk.tensor, chunk.at, chunk.at + chunk.numel)
            importance = torch.zeros_like(value) if found is None else found.double().view(value.shape)
            importance = importance.clamp_min_(self.floor).mul_(weight)
            merged, total = merged + importance * value, total + importance
        return merged / total
