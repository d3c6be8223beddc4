"""Merges one tensor, for a static merge and for a twin alike: in stretches where the method allows, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from twinmerge.errors import CheckpointError, RecipeError
from twinmerge.merging.method import Chunk, Method
from twinmerge.merging.statistics import Statistics

Read = Callable[[bool], Iterator[Chunk]]
"""Goes through one tensor of all models: flattened, in stretches, or, if it is told so, as one chunk in its shape."""


def merge_tensor(
    method: Method, read: Read, statistics: Statistics, dtype: torch.dtype, *, whole: bool
) -> Iterator[tuple[int, Tensor]]:
    """Merge one tensor.

    Args:
        method: with a scaling that is a number.
        read: gives the tensor of all models, finite.
        statistics: what the method's pre-pass found.
        dtype: of the result.
        whole: whether the method takes this tensor whole (`Method.takes_whole`).

    Yields:
        Which entry of the tensor comes next, and rounded entries from there on.

    Raises:
        CheckpointError: if a merged value is none that the dtype holds, or none that the tensor may have.
        RecipeError: if the method gives another number of entries than it got.
    """
    for chunk, merged in merged_chunks(method, read, statistics, whole=whole):
        yield chunk.at, _rounded(chunk.tensor, merged, dtype)


def merged_chunks(method: Method, read: Read, statistics: Statistics, *, whole: bool) -> Iterator[tuple[Chunk, Tensor]]:
    """As `merge_tensor`, but what was merged too, and the result not rounded."""
    statistics = replace(statistics, tensor=method.measure(lambda: read(False), statistics))
    for chunk in read(whole):
        merged = method.merge(chunk, statistics)
        if merged.numel() != chunk.numel:
            raise RecipeError(
                f"{chunk.tensor!r}: merge method {method.method!r} must give the {chunk.numel} entries that it got, "
                f"found {list(merged.shape)}"
            )
        yield chunk, merged


def _rounded(name: str, merged: Tensor, dtype: torch.dtype) -> Tensor:
    rounded, largest = merged.to(dtype).reshape(-1), torch.finfo(dtype).max
    low, high = torch.aminmax(rounded if dtype.itemsize > 1 else merged)  # 8 bits are cut off at their largest value
    if not (low >= -largest and high <= largest):
        raise CheckpointError(
            f"{name!r}: the merged values go up to {float(merged.abs().max()):.3g}, more than {dtype} holds; choose "
            "another dtype or smaller weights"
        )
    if low < 0 and name.endswith("running_var"):
        raise CheckpointError(
            f"{name!r}: the merged variances go down to {float(low):.3g}, and a variance is at least 0; choose a "
            "smaller scaling, or method average"
        )
    return rounded
