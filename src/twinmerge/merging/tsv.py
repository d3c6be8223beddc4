"""Merges experts by TSV-M: leading singular directions of all tasks, made orthonormal (arXiv:2412.00081)."""

from __future__ import annotations

import torch
from torch import Tensor

from twinmerge.merging.method import Chunk, Scaled, merge_method
from twinmerge.merging.spectra import is_layer, leading, mean_change, memory_bytes, orthonormal, shape_of
from twinmerge.merging.statistics import Statistics


@merge_method("tsv_m", paper="arXiv:2412.00081")
class TsvM(Scaled):
    """theta_0 + lambda U S V', each task's top min(out, in) / T triplets, U and V orthonormal; the mean of others."""

    whole = True

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The base and the product of the orthonormal directions."""
        if is_layer(chunk):
            count = max(min(shape_of(chunk)) // len(chunk.names), 1)
            found = [leading(chunk.task_vector(name), count) for name in chunk.names]
            left = orthonormal(torch.cat([task.left for task in found], dim=1))
            right = orthonormal(torch.cat([task.right for task in found], dim=1))
            change = (left * torch.cat([task.values for task in found])) @ right.T
        else:
            change = mean_change(chunk)
        return change.mul_(self.factor).add_(chunk.base_value())

    def memory_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        """Directions of one task at a time, and those of all that are kept."""
        return memory_bytes(shape, experts)
