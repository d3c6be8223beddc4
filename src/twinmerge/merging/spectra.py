"""What merges of matrices by their singular directions share: which tensors those are, and orthonormal directions."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from twinmerge.merging.method import Chunk, Scaled
from twinmerge.merging.statistics import Statistics
from twinmerge.tensors.low_rank import decompose

_NONE = 1e-6
"""Of the largest singular value: what is smaller is rounding, and no direction."""
_EMBEDDINGS = ("embed", "wte", "wpe", "shared", "relative_attention_bias")
"""What names of tables that are looked up in have in them."""
_OUTPUT = "embed_out"
"""What GPT-NeoX calls its output layer."""


@dataclass(frozen=True)
class Directions:
    """Leading singular directions of a matrix: `left` (out, k), `values` (k,), `right` (in, k), float64."""

    left: Float64[Tensor, "out k"]
    values: Float64[Tensor, " k"]
    right: Float64[Tensor, "in k"]


class Spectral(Scaled):
    """A method about matrices that inputs are multiplied with; others it sees in stretches, and averages."""

    whole = True

    def takes_whole(self, tensor: str, shape: tuple[int, ...]) -> bool:
        """Matrices, by their names no embeddings."""
        return is_layer(tensor, shape)

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The base and a change of a matrix; the mean of other tensors."""
        change = self.change(chunk) if is_layer(chunk.tensor, shape_of(chunk)) else mean_change(chunk)
        return change.mul_(self.factor).add_(chunk.base_value())

    @abstractmethod
    def change(self, chunk: Chunk) -> Float64[Tensor, "out in"]:
        """What is added to a matrix at scaling 1."""

    def memory_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        """Matrices of directions in float64, of all that are kept, and Gram matrices of the shorter side."""
        short, long = sorted(shape)
        return 8 * short * (6 * long + 6 * short) + 8 * short * long * experts


def is_layer(tensor: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix that inputs are multiplied with: two axes, and by its name no embeddings."""
    return len(shape) == 2 and not is_embedding(tensor)


def is_embedding(tensor: str) -> bool:
    """Whether a tensor is by its name a table that is looked up in."""
    parts = tensor.split(".")
    return _OUTPUT not in parts and any(word in part for part in parts for word in _EMBEDDINGS)


def shape_of(chunk: Chunk) -> tuple[int, ...]:
    """Of the tensor, if it is whole; of a stretch, its length alone."""
    return tuple(next(iter({**chunk.experts, **chunk.changes}.values())).shape)


def mean_change(chunk: Chunk) -> Float64[Tensor, "..."]:
    """What these methods do with every other tensor: the mean of the task vectors."""
    return torch.stack([chunk.task_vector(name, torch.float64) for name in chunk.names]).mean(0)


def leading(matrix: Float[Tensor, "out in"], count: int | None = None) -> Directions:
    """Singular directions of a matrix, the largest first: all, or at most `count`; none that is rounding."""
    factors, _ = decompose(matrix, None if count is None else min(count, *matrix.shape))
    up, down = factors.up.double(), factors.down.double()
    values = up.norm(dim=0)
    there = values > _NONE * values.max() if len(values) else values > 0
    return Directions((up / values)[:, there], values[there], down.T[:, there])


def orthonormal(columns: Float64[Tensor, "side k"]) -> Float64[Tensor, "side k"]:
    """The nearest matrix of orthonormal columns: P Q' of the singular value decomposition P S Q'.

    Directions that columns have in common count once: they are shared out, and none is made up for what is missing.
    """
    values, vectors = torch.linalg.eigh(columns.T @ columns)
    there = values > _NONE**2 * values.max() if len(values) else values > 0
    basis = vectors[:, there]
    found: Tensor = columns @ ((basis / values[there].sqrt()) @ basis.T)
    return found
