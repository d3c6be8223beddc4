"""Keeps a share of a difference's entries, by size or by a reproducible draw (METHOD §3)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int32
from torch import Tensor

from twinmerge.errors import InputError, RecipeError

_CHUNK = 1 << 17  # random numbers in memory at a time: they stay in the cache


@dataclass(frozen=True)
class Sparse:
    """A matrix as its kept entries (METHOD §3).

    `indices` count row by row through the flattened matrix and rise.
    """

    indices: Int32[Tensor, " kept"]
    values: Float[Tensor, " kept"]
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        """Refuse a matrix whose flat indices do not fit int32.

        Raises:
            InputError: if it has 2^31 entries or more.
        """
        if math.prod(self.shape) >= 2**31:
            raise InputError(f"a sparse part has fewer than 2^31 entries, found shape {self.shape}; use a rank instead")

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of indices and values."""
        return self.indices.nbytes + self.values.nbytes

    def energy(self) -> float:
        """Squared Frobenius norm."""
        return float(self.values.double().square().sum())

    def dense(self) -> Float[Tensor, "out in"]:
        """The matrix itself, zero where nothing was kept, in the dtype of the values."""
        flat = self.values.new_zeros(math.prod(self.shape))
        flat[self.indices.long()] = self.values
        return flat.view(self.shape)

    def to(self, dtype: torch.dtype) -> Sparse:
        """The same entries in another float dtype."""
        return Sparse(self.indices, self.values.to(dtype), self.shape)

    def pack(self) -> dict[str, Tensor]:
        """`indices` and `values`."""
        return {"indices": self.indices, "values": self.values}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Sparse:
        """What `pack` gave, of a matrix of this shape."""
        rows, columns = shape
        return cls(tensors["indices"], tensors["values"], (rows, columns))


def keep_largest(difference: Float[Tensor, "out in"], density: float) -> Sparse:
    """Keep the entries of largest magnitude, of equal ones the first (METHOD §3).

    Args:
        difference: expert minus shared expert, `(out, in)`.
        density: fraction kept, in (0, 1]; exactly `kept_count` entries remain.

    Raises:
        RecipeError: if `density` is outside (0, 1].
    """
    flat = difference.flatten()
    magnitude = flat.abs()
    count = kept_count(flat.numel(), density)
    threshold = kth_magnitude(flat, count)
    kept = magnitude > threshold
    equal = (magnitude == threshold).nonzero().squeeze(1)
    kept[equal[: count - int(kept.sum())]] = True
    return _gather(difference, kept)


def keep_random(difference: Float[Tensor, "out in"], density: float, seed: int, expert: str, name: str) -> Sparse:
    """Keep each entry with probability `density` and divide by it, so the mean is unchanged.

    The draw is DARE's (arXiv:2311.03099): see `drop_mask`.

    Raises:
        RecipeError: if `density` is outside (0, 1].
    """
    kept = ~drop_mask(difference.numel(), density, seed, expert, name).to(difference.device)
    sparse = _gather(difference, kept)
    return Sparse(sparse.indices, sparse.values / density, sparse.shape)


def kept_count(numel: int, density: float) -> int:
    """How many of `numel` entries a density keeps: `round(density * numel)`, at least one.

    Raises:
        RecipeError: if `density` is outside (0, 1].
    """
    if not 0 < density <= 1:
        raise RecipeError(f"density is the fraction kept and must be in (0, 1], found {density}")
    return max(1, round(density * numel))


def kth_magnitude(tensor: Float[Tensor, "..."], k: int) -> float:
    """The `k`-th largest absolute value, found without sorting."""
    magnitude = tensor.abs().flatten()
    return magnitude.kthvalue(magnitude.numel() - k + 1).values.item()


def drop_mask(
    numel: int, density: float, seed: int, expert: str, name: str, start: int = 0, stop: int | None = None
) -> Bool[Tensor, " entries"]:
    """Draw which entries of a flattened tensor are dropped, each with probability `1 - density`.

    Entry i depends on `(seed, expert, name, i)` alone: the first three seed the generator (PCG64DXSM), which can be
    set to any place of its stream, and i is the place. So any order of experts, any chunking and any machine give the
    same bits.

    Args:
        numel: entries of the whole tensor.
        density: fraction kept, in (0, 1].
        seed: of the recipe.
        expert: name of the expert.
        name: name of the tensor.
        start: first entry asked for.
        stop: entry after the last, `numel` if None.

    Returns:
        True where dropped, `(stop - start,)`, on the CPU.

    Raises:
        RecipeError: if `density` is outside (0, 1].
    """
    kept_count(numel, density)
    stop = numel if stop is None else stop
    key = int.from_bytes(hashlib.sha256(json.dumps([seed, expert, name]).encode()).digest()[:16], "little")
    upper, lower = divmod(max(int(density * 2**32) - 1, 0), 1 << 16)  # the highest draw of 32 bits that is kept
    dropped = np.empty(stop - start, dtype=np.bool_)
    for begin in range(start, stop, _CHUNK):
        end = min(begin + _CHUNK, stop)
        first, skipped = divmod(begin, 4)  # upper halves of four draws in each of the generator's numbers
        needed = end - begin + skipped
        draws = np.random.PCG64DXSM(key).advance(first).random_raw((needed + 3) // 4).view("<u2")[skipped:needed]
        part = np.greater(draws, upper, out=dropped[begin - start : end - start])
        for place in np.flatnonzero(draws == upper):  # one in 65,536: the lower half decides
            part[place] = _lower_half(key, begin + int(place)) > lower
    return torch.from_numpy(dropped)


def uniform(numel: int, seed: int, expert: str, name: str) -> Float64[Tensor, " entries"]:
    """A number in [0, 1) for every entry of a tensor, which depends on `(seed, expert, name)` and its place alone."""
    key = int.from_bytes(hashlib.sha256(json.dumps([seed, expert, name]).encode()).digest()[:16], "little")
    return torch.from_numpy(np.random.Generator(np.random.PCG64DXSM(key)).random(numel))


def _lower_half(key: int, entry: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{key} {entry}".encode()).digest()[:2], "little")


def _gather(difference: Float[Tensor, "out in"], kept: Bool[Tensor, " entries"]) -> Sparse:
    indices = kept.nonzero().squeeze(1)
    rows, columns = difference.shape
    return Sparse(indices.int(), difference.flatten()[indices], (rows, columns))
