"""Makes each task's model by EMR: one elected task vector, and a mask and a scale of each task (arXiv:2405.17461)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from twinmerge.files.checkpoint import TensorSpec
from twinmerge.merging.method import Chunk, Chunks, merge_method
from twinmerge.merging.per_task import PerTask, masked_bytes
from twinmerge.merging.statistics import Statistics


@merge_method("emr", paper="arXiv:2405.17461")
class Emr(PerTask):
    """theta_0 + scale_t mask_t tau, tau having the sum's sign and the largest magnitude among those that agree."""

    def prepass(self, model: Chunks) -> dict[str, float]:
        """By expert, sum |tau_t| / sum |mask_t tau| over the whole model, 1 where nothing is left."""
        own: dict[str, float] = {}
        kept: dict[str, float] = {}
        for chunk in model():
            elected = _elected(chunk)
            for name in chunk.names:
                vector = chunk.task_vector(name)
                own[name] = own.get(name, 0.0) + float(vector.abs().sum(dtype=torch.float64))
                masked = elected[vector * elected > 0]
                kept[name] = kept.get(name, 0.0) + float(masked.abs().sum(dtype=torch.float64))
        return {name: own[name] / kept[name] if kept[name] else 1.0 for name in own}

    def change(self, chunk: Chunk, name: str, statistics: Statistics) -> Tensor:
        """The elected vector under the task's mask and scale."""
        elected = _elected(chunk)
        masked = elected.mul_(chunk.task_vector(name) * elected > 0)
        return masked.double().mul_(statistics.model[name]).add_(chunk.base_value())

    def stored_bytes(self, specs: Iterable[TensorSpec], experts: int) -> dict[str, int]:
        """The base, the elected vector, masks of one bit and a scale of each task."""
        return masked_bytes(specs, experts, numbers=1)


def _elected(chunk: Chunk) -> Tensor:
    """The unified task vector, float32."""
    sign, largest = chunk.total().sign_(), torch.zeros_like(chunk.task_vector(chunk.names[0]))
    for name in chunk.names:
        vector = chunk.task_vector(name)
        largest = torch.where(vector * sign > 0, torch.maximum(largest, vector.abs()), largest)
    return largest.mul_(sign)
