"""Merges experts by TSV-M: leading singular directions of all tasks, made orthonormal (arXiv:2412.00081)."""

from __future__ import annotations

import torch
from torch import Tensor

from twinmerge.merging.method import Chunk, merge_method
from twinmerge.merging.spectra import Spectral, leading, orthonormal, shape_of


@merge_method("tsv_m", paper="arXiv:2412.00081")
class TsvM(Spectral):
    """theta_0 + lambda U S V', each task's top min(out, in) / T triplets, U and V orthonormal; the mean of others."""

    def change(self, chunk: Chunk) -> Tensor:
        """The product of the orthonormal directions."""
        count = max(min(shape_of(chunk)) // len(chunk.names), 1)
        found = [leading(chunk.task_vector(name), count) for name in chunk.names]
        left = orthonormal(torch.cat([task.left for task in found], dim=1))
        right = orthonormal(torch.cat([task.right for task in found], dim=1))
        return (left * torch.cat([task.values for task in found])) @ right.T
