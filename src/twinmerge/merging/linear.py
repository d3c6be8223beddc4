"""Merges that add a multiple of the summed task vectors to the base."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Float32
from torch import Tensor


def weight_average(
    base: Float[Tensor, "*shape"], task_vectors: Mapping[str, Float32[Tensor, "*shape"]]
) -> Float32[Tensor, "*shape"]:
    """The mean of the experts: base + mean of task vectors (METHOD §2, arXiv:2203.05482)."""
    return task_arithmetic(base, task_vectors, scaling=1 / len(task_vectors))


def task_arithmetic(
    base: Float[Tensor, "*shape"], task_vectors: Mapping[str, Float32[Tensor, "*shape"]], scaling: float
) -> Float32[Tensor, "*shape"]:
    """Add up what the experts learned: base + scaling * sum of task vectors (METHOD §2, arXiv:2212.04089).

    Args:
        base: a parameter of the base model, any float dtype.
        task_vectors: expert - base in float32, by expert; at least one.
        scaling: lambda, about 0.3 in the paper.

    Returns:
        The merged parameter in float32; round it once, to the dtype it is stored in.
    """
    return base.float() + scaling * sum_of(task_vectors)


def sum_of(task_vectors: Mapping[str, Float32[Tensor, "*shape"]]) -> Float32[Tensor, "*shape"]:
    """Sum of the task vectors in the sorted order of the experts' names: same bits for any order given."""
    first, *others = sorted(task_vectors)
    total = task_vectors[first].clone(memory_format=torch.contiguous_format)
    for expert in others:
        total += task_vectors[expert]
    return total
