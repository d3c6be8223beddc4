"""TIES: trim small changes, elect a sign, merge what agrees with it (arXiv:2306.01708)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from twinmerge.tensors.sparse import kept_count, kth_magnitude

Stream = Callable[[], Iterator[tuple[str, Mapping[str, Tensor]]]]
"""Goes through the model from its start: name of a tensor, its task vectors by expert."""

_LOW_BITS = 16
_EVERY = 17  # entries to one that is looked at first; no power of two, as the sides of matrices are
_MOST_BINS = 32  # counted one by one, 2^16 counts each
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

    Exact, in two passes and without sorting: magnitudes of float32 are ordered as their bit patterns, so a histogram of
    the upper 16 bits of some entries says in which few bins the threshold lies; the second pass counts what lies above
    them and makes a histogram of all 32 bits inside. If those bins are too many, or the wrong ones, all entries are
    counted in the first pass too, which is then done again. Entries equal to the threshold are all kept.

    Args:
        stream: gives the task vectors in float32, tensor by tensor; called two to four times.
        density: fraction of the whole task vector kept, in (0, 1].

    Raises:
        RecipeError: if `density` is outside (0, 1].
    """
    thresholds = _thresholds(stream, density, _EVERY)
    return thresholds if thresholds is not None else _thresholds(stream, density, 1) or {}


@dataclass
class _Search:
    """Where one expert's threshold is looked for."""

    numel: int = 0
    upper: Tensor = field(default_factory=lambda: torch.zeros(1 << 15, dtype=torch.int64))
    """Some entries by the upper 16 bits of their magnitude."""
    lowest: int = 0
    """The first bit pattern that is counted one by one."""
    above: int = 0
    """Entries beyond all that are counted one by one."""
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def add_some(self, vector: Tensor, every: int) -> None:
        self.numel += vector.numel()
        self.upper += torch.bincount(_magnitude_bits(vector.flatten()[::every]) >> _LOW_BITS, minlength=1 << 15)

    def narrow(self, density: float, every: int) -> bool:
        """Choose the bins that are counted; False if some entries are too few to say."""
        seen = int(self.upper.sum())
        wanted = kept_count(self.numel, density) * seen / self.numel
        spread = 0.0 if every == 1 else 6 * math.sqrt(wanted) + 8
        first = _find(self.upper, min(math.ceil(wanted + spread), seen))[0]
        last = _find(self.upper, max(math.ceil(wanted - spread), 1))[0]
        self.lowest = first << _LOW_BITS
        self.counts = torch.zeros(
            (last - first + 1 if last - first < _MOST_BINS else 0) << _LOW_BITS, dtype=torch.int64
        )
        return len(self.counts) > 0 and (every == 1 or seen > wanted + spread)

    def add_all(self, vector: Tensor) -> None:
        place = _magnitude_bits(vector) - self.lowest
        inside = place[(place >= 0) & (place < len(self.counts))].long()
        self.above += int((place >= len(self.counts)).sum())
        self.counts.index_add_(0, inside, torch.ones_like(inside))

    def threshold(self, density: float) -> float | None:
        """The threshold; None if it is not among the bins."""
        missing = kept_count(self.numel, density) - self.above
        if not 0 < missing <= int(self.counts.sum()):
            return None
        bits = torch.tensor(self.lowest + _find(self.counts, missing)[0], dtype=torch.int32)
        return bits.view(torch.float32).item()


def _thresholds(stream: Stream, density: float, every: int) -> dict[str, float] | None:
    """The thresholds, found by every so manieth entry; None if those did not suffice."""
    searches: dict[str, _Search] = {}
    for _, task_vectors in stream():
        for expert, vector in task_vectors.items():
            searches.setdefault(expert, _Search()).add_some(vector, every)
    if not all(search.narrow(density, every) for search in searches.values()):
        return None
    for _, task_vectors in stream():
        for expert, vector in task_vectors.items():
            searches[expert].add_all(vector)
    found = {expert: search.threshold(density) for expert, search in searches.items()}
    return (
        {expert: value for expert, value in found.items() if value is not None} if None not in found.values() else None
    )


def _magnitude_bits(vector: Float32[Tensor, "..."]) -> Tensor:
    return vector.cpu().abs().flatten().view(torch.int32)


def _find(histogram: Int64[Tensor, " bins"], k: int) -> tuple[int, int]:
    """The bin of the k-th largest entry, and which largest of that bin it is."""
    from_top = histogram.flip(0).cumsum(0)
    above = int((from_top < k).sum())
    return len(histogram) - 1 - above, k - (int(from_top[above - 1]) if above else 0)
