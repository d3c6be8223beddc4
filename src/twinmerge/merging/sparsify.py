"""DARE: drop most of a task vector at random and rescale the rest (arXiv:2311.03099)."""

from __future__ import annotations

import torch
from jaxtyping import Float32
from torch import Tensor

from twinmerge.tensors.sparse import drop_mask


def dare(
    task_vector: Float32[Tensor, "*shape"], *, density: float, seed: int, expert: str, name: str, at: int = 0
) -> Float32[Tensor, "*shape"]:
    """Drop each entry with probability `1 - density`, divide the others by `density`.

    The expected value of every entry stays what it was. The draw is `drop_mask`'s: it depends on
    seed, expert, tensor and entry alone; `at` says which entry of the tensor the first one is.

    Raises:
        RecipeError: if `density` is outside (0, 1].

    Source: METHOD §2, arXiv:2311.03099, equation 2.
    """
    count = task_vector.numel()
    dropped = drop_mask(count, density, seed, expert, name, at, at + count).view(task_vector.shape)
    return torch.where(dropped.to(task_vector.device), 0.0, task_vector / density)
