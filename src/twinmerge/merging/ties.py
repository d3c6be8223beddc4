"""TIES: trim small changes, elect a sign, merge what agrees with it (arXiv:2306.01708)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from twinmerge.tensors.sparse import kept_count, kth_magnitude

Stream = Callable[[], Iterator[tuple[str, Mapping[str, Tensor]]]]
"""Goes through the model from its start: name of a tensor, its task vectors by expert."""

_LOW_BITS = 16
_CHUNK = 1 << 18  # entries elected at a time: what they need stays in cache


def ties(
    base: Float[Tensor, "*shape"],
    task_vectors: Mapping[str, Float32[Tensor, "*shape"]],
    *,
    thresholds: Mapping[str, float],
    scaling: float,
) -> Float32[Tensor, "*shape"]:
    """Trim each task vector, then merge without interference: base + scaling * disjoint mean.

    Args:
        base: a parameter of the base model, any float dtype.
        task_vectors: expert - base in float32, by expert; at least one.
        thresholds: smallest magnitude kept, by expert: from `model_thresholds`, as the paper does,
            or from `tensor_thresholds`.
        scaling: lambda, 1 in the paper without validation data.

    Returns:
        The merged parameter in float32.

    Source: METHOD §2, arXiv:2306.01708, algorithm 1.
    """
    trimmed = {
        expert: torch.where(vector.abs() >= thresholds[expert], vector, 0.0) for expert, vector in task_vectors.items()
    }
    return base.float() + scaling * disjoint_mean(trimmed)


def disjoint_mean(task_vectors: Mapping[str, Float32[Tensor, "*shape"]]) -> Float32[Tensor, "*shape"]:
    """Elect each entry's sign by the sum over experts, then average the experts that have that sign.

    Entries that are zero in an expert take no part; an entry whose sum is zero stays zero.
    """
    ordered = [task_vectors[expert].reshape(-1) for expert in sorted(task_vectors)]
    merged = torch.empty_like(ordered[0])
    for chunk in range(0, len(merged), _CHUNK):
        merged[chunk : chunk + _CHUNK] = _elect_and_average([vector[chunk : chunk + _CHUNK] for vector in ordered])
    return merged.view(next(iter(task_vectors.values())).shape)


def _elect_and_average(ordered: list[Float32[Tensor, " entries"]]) -> Float32[Tensor, " entries"]:
    elected = sum(ordered[1:], start=ordered[0]).sign()
    total = torch.zeros_like(elected)
    count = torch.zeros_like(elected)
    for vector in ordered:
        agrees = (vector * elected) > 0
        total += vector * agrees
        count += agrees
    return total / count.clamp(min=1)


def tensor_thresholds(task_vectors: Mapping[str, Float32[Tensor, "*shape"]], density: float) -> Mapping[str, float]:
    """The `kept_count`-th largest magnitude of one tensor, by expert.

    Raises:
        RecipeError: if `density` is outside (0, 1].
    """
    return {
        expert: kth_magnitude(vector, kept_count(vector.numel(), density)) for expert, vector in task_vectors.items()
    }


def model_thresholds(stream: Stream, density: float) -> Mapping[str, float]:
    """The `kept_count`-th largest magnitude of each expert's whole task vector.

    Exact, in two passes and without sorting: magnitudes of float32 are ordered as their bit patterns,
    so a histogram of the upper 16 bits finds the bin of the threshold, and one of the lower 16 bits
    inside that bin finds the threshold. Entries equal to it are all kept.

    Args:
        stream: gives the task vectors in float32, tensor by tensor; called twice.
        density: fraction of the whole task vector kept, in (0, 1].

    Raises:
        RecipeError: if `density` is outside (0, 1].
    """
    upper: dict[str, Int64[Tensor, " bins"]] = {}
    for _, task_vectors in stream():
        for expert, vector in task_vectors.items():
            histogram = torch.bincount(_magnitude_bits(vector) >> _LOW_BITS, minlength=1 << 15)
            upper[expert] = upper.get(expert, 0) + histogram
    bins = {expert: _find(histogram, kept_count(int(histogram.sum()), density)) for expert, histogram in upper.items()}

    lower = {expert: torch.zeros(1 << _LOW_BITS, dtype=torch.int64) for expert in bins}
    for _, task_vectors in stream():
        for expert, vector in task_vectors.items():
            bits = _magnitude_bits(vector)
            inside = bits[bits >> _LOW_BITS == bins[expert][0]] & ((1 << _LOW_BITS) - 1)
            lower[expert] += torch.bincount(inside, minlength=1 << _LOW_BITS)
    thresholds = {}
    for expert, (bin_, missing) in bins.items():
        bits = torch.tensor(bin_ << _LOW_BITS | _find(lower[expert], missing)[0], dtype=torch.int32)
        thresholds[expert] = bits.view(torch.float32).item()
    return thresholds


def _magnitude_bits(vector: Float32[Tensor, "..."]) -> Tensor:
    return vector.cpu().abs().flatten().view(torch.int32)


def _find(histogram: Int64[Tensor, " bins"], k: int) -> tuple[int, int]:
    """The bin of the k-th largest entry, and which largest of that bin it is."""
    from_top = histogram.flip(0).cumsum(0)
    above = int((from_top < k).sum())
    return len(histogram) - 1 - above, k - (int(from_top[above - 1]) if above else 0)
