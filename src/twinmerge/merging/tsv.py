"""Merges by leading singular directions of all tasks, made orthonormal, or keeps each task's (arXiv:2412.00081)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from twinmerge.files.checkpoint import TensorSpec
from twinmerge.merging.method import Chunk, merge_method
from twinmerge.merging.per_task import PerTask
from twinmerge.merging.spectra import Spectral, is_embedding, is_layer, leading, mean_change, orthonormal, shape_of
from twinmerge.merging.statistics import Statistics


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


@merge_method("tsv_c", paper="arXiv:2412.00081")
class TsvC(PerTask):
    """theta_0 + the task's own top min(out, in) / T triplets; the mean of embeddings, the task's own vectors."""

    whole = True

    def takes_whole(self, tensor: str, shape: tuple[int, ...]) -> bool:
        """Matrices, by their names no embeddings."""
        return is_layer(tensor, shape)

    def change(self, chunk: Chunk, name: str, statistics: Statistics) -> Tensor:
        """A matrix's leading directions."""
        shape = shape_of(chunk)
        if is_layer(chunk.tensor, shape):
            found = leading(chunk.task_vector(name), max(min(shape) // len(chunk.names), 1))
            change = (found.left * found.values) @ found.right.T
        elif is_embedding(chunk.tensor):
            change = mean_change(chunk)
        else:
            change = chunk.task_vector(name, torch.float64)
        return change.add_(chunk.base_value())

    def memory_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        """Directions of one matrix in float64, and Gram matrices of its shorter side."""
        short, long = sorted(shape)
        return 8 * short * (6 * long + 6 * short)

    def stored_bytes(self, specs: Iterable[TensorSpec], experts: int) -> dict[str, int]:
        """The base with the mean of embeddings, and of each task its directions and what is no matrix."""
        floats, own = [spec for spec in specs if spec.dtype.is_floating_point], 0
        for spec in floats:
            if is_layer(spec.name, spec.shape):
                own += max(min(spec.shape) // experts, 1) * (sum(spec.shape) + 1) * spec.dtype.itemsize
            elif not is_embedding(spec.name):
                own += spec.nbytes
        return {"shared": sum(spec.nbytes for spec in floats), "exclusive": experts * own}
