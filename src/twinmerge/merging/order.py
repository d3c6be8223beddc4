"""Finds the k-th largest of very many numbers without sorting: float32 that are 0 or more are ordered as their bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

Numbers = Callable[[], Iterator[tuple[str, Float32[Tensor, " entries"]]]]
"""Goes through the numbers of every name, stretch by stretch, all 0 or more; may be called again."""
_LOW_BITS = 16


def kth_largest(numbers: Numbers, k: Callable[[str, int], int]) -> Mapping[str, float]:
    """The k-th largest number of each name, exact, in two passes.

    A histogram of the upper 16 bits finds the bin of the threshold, one of the lower 16 bits inside that bin finds it.

    Args:
        numbers: gone through twice.
        k: which largest, of a name and how many numbers it has; 1 is the largest.
    """
    upper: dict[str, Int64[Tensor, " bins"]] = {}
    for name, bits in _bits(numbers):
        upper[name] = upper.get(name, 0) + torch.bincount(bits >> _LOW_BITS, minlength=1 << 15)
    bins = {name: _find(histogram, k(name, int(histogram.sum()))) for name, histogram in upper.items()}
    lower = {name: torch.zeros(1 << _LOW_BITS, dtype=torch.int64) for name in bins}
    for name, bits in _bits(numbers):
        inside = bits[bits >> _LOW_BITS == bins[name][0]] & ((1 << _LOW_BITS) - 1)
        lower[name] += torch.bincount(inside, minlength=1 << _LOW_BITS)
    found = {}
    for name, (bin_, missing) in bins.items():
        bits = torch.tensor(bin_ << _LOW_BITS | _find(lower[name], missing)[0], dtype=torch.int32)
        found[name] = bits.view(torch.float32).item()
    return found


def _bits(numbers: Numbers) -> Iterator[tuple[str, Tensor]]:
    return ((name, values.flatten().view(torch.int32)) for name, values in numbers())


def _find(histogram: Int64[Tensor, " bins"], k: int) -> tuple[int, int]:
    """The bin of the k-th largest entry, and which largest of that bin it is."""
    from_top = histogram.flip(0).cumsum(0)
    above = int((from_top < k).sum())
    return len(histogram) - 1 - above, k - (int(from_top[above - 1]) if above else 0)
