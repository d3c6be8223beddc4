"""Finds what each task needs of the sum of all (TALL masks), and merges by their consensus (arXiv:2405.07813)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.files.checkpoint import TensorSpec
from twinmerge.merging.method import Chunk, Each, Scaled, Scaling, merge_method, of_expert
from twinmerge.merging.per_task import PerTask, masked_bytes
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
        total = chunk.total()
        masks = torch.zeros_like(total)
        for name in chunk.names:
            masks.add_(_mask(chunk.task_vector(name), total, of_expert(self.threshold, name)))
        kept = total.mul_(masks >= min(self.agreement, len(chunk.names)))
        return kept.double().mul_(self.factor).add_(chunk.base_value())


@merge_method("tall", paper="arXiv:2405.07813")
class Tall(PerTask):
    """theta_0 + m_t sum tau, m_t = |tau_t| > threshold |sum tau - tau_t|."""

    data = "none, or labelled validation rows to choose the threshold"
    threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.4
    """How much of the other tasks' sum an entry must outweigh; the paper chooses it from 0.2 to 0.6 on validation."""

    def change(self, chunk: Chunk, name: str, statistics: Statistics) -> Tensor:
        """What the task's mask holds of the sum."""
        total = chunk.total()
        mask = _mask(chunk.task_vector(name), total, self.threshold)
        return total.mul_(mask).double().add_(chunk.base_value())

    def stored_bytes(self, specs: Iterable[TensorSpec], experts: int) -> dict[str, int]:
        """The base, the sum, and masks of one bit."""
        return masked_bytes(specs, experts)


def _mask(vector: Tensor, total: Tensor, threshold: float) -> Tensor:
    return vector.abs() > threshold * (total - vector).abs()
