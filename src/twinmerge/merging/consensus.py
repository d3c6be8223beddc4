"""Merges experts by the consensus of their TALL masks: keep what more than one task needs (arXiv:2405.07813)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.merging.method import Chunk, Each, Scaled, Scaling, merge_method, of_expert
from twinmerge.merging.statistics import Statistics

Threshold = Annotated[
    float | dict[str, float],
    Each(Annotated[float, Field(gt=0, allow_inf_nan=False, description="a number above 0")]),
]


@merge_method("consensus", paper="arXiv:2405.07813")
class Consensus(Scaled):
    """theta_0 + lambda times the sum of task vectors where m_t = |tau_t| > threshold |sum tau - tau_t| for enough t."""

    scaling: Scaling = 0.3
    threshold: Threshold = 0.4
    """How much of the other tasks' sum an entry must outweigh; the paper chooses it from 0.2 to 0.6 on validation."""
    agreement: Annotated[int, Field(ge=1)] = 2
    """Tasks whose masks must hold an entry; all of them where there are fewer."""

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The base and the kept entries of the sum, added up in float32."""
        vectors = {name: chunk.task_vector(name) for name in chunk.names}
        total = torch.zeros_like(vectors[chunk.names[0]])
        for vector in vectors.values():
            total.add_(vector)
        masks = torch.zeros_like(total)
        for name, vector in vectors.items():
            masks.add_(vector.abs() > of_expert(self.threshold, name) * (total - vector).abs())
        kept = total.mul_(masks >= min(self.agreement, len(vectors)))
        return kept.double().mul_(self.factor).add_(chunk.base_value())
