"""Stores a low-rank pair in 4 bits: sixteen levels an entry, one scale a direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from twinmerge.errors import CheckpointError
from twinmerge.tensors.low_rank import LowRank
from twinmerge.tensors.whitening import Whitening

FOUR_BITS = torch.uint8
"""What the files hold: two entries a byte."""
_MIDDLE = 7.5
"""Level 0 is -7.5, level 15 is 7.5; no level is zero."""
_SCALE_BYTES = 4
_BLOCK = 64
"""Entries rounded one after the other before the others are told."""
_CLIPS = (0.4, 0.5, 0.6, 0.7, 0.775, 0.85, 0.925, 1.0)
"""Shares of a vector's largest magnitude that the outermost level may stand for."""


@dataclass(frozen=True)
class FourBits:
    """A pair as it is stored in 4 bits; directions sorted as in `LowRank`, whose form it takes by `to`.

    A row of `rows` is a direction: its entries of `up`, then of `down`, two levels a byte, the first in the low half;
    then a float32 scale. The direction is `scale * (levels - 7.5) of up * (levels - 7.5) of down`.
    """

    rows: UInt8[Tensor, "rank bytes"]
    shape: tuple[int, int]
    """Of the matrix, `(out, in)`."""

    @property
    def rank(self) -> int:
        """Directions kept."""
        return self.rows.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the bytes."""
        return self.rows.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all directions."""
        return self.rows.nbytes

    def energy(self) -> float:
        """Squared Frobenius norm of the matrix."""
        return self.to(torch.float64).energy()

    def dense(self) -> Float[Tensor, "out in"]:
        """The matrix itself, in float32."""
        return self.to(torch.float32).dense()

    def truncate(self, rank: int) -> FourBits:
        """Keep the first `rank` directions, at most all there are."""
        return FourBits(self.rows[:rank].contiguous(), self.shape)

    def to(self, dtype: torch.dtype) -> LowRank:
        """The pair in a float dtype, each direction's length shared evenly by both factors."""
        out, columns = self.shape
        middle = _bytes_of(out)
        root = self.rows[:, -_SCALE_BYTES:].flatten().clone().view(torch.float32).double().sqrt()[:, None]
        up = (_levels(self.rows[:, :middle], out) - _MIDDLE) * root
        down = (_levels(self.rows[:, middle:-_SCALE_BYTES], columns) - _MIDDLE) * root
        return LowRank(up.T.to(dtype).contiguous(), down.to(dtype).contiguous())

    def pack(self) -> dict[str, Tensor]:
        """`four_bits`."""
        return {"four_bits": self.rows.contiguous()}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> FourBits:
        """What `pack` gave.

        Raises:
            CheckpointError: if the bytes do not fit a matrix of that shape.
        """
        rows = tensors["four_bits"]
        out, columns = shape
        if rows.dtype != torch.uint8 or rows.ndim != 2 or rows.shape[1] != direction_bytes(out, columns):
            raise CheckpointError(
                f"4-bit factors of a matrix {(out, columns)} must be bytes (rank, {direction_bytes(out, columns)}), "
                f"found {tuple(rows.shape)} {rows.dtype}"
            )
        return cls(rows, (out, columns))


def direction_bytes(out: int, columns: int) -> int:
    """Bytes of one direction of an (out, columns) matrix."""
    return _bytes_of(out) + _bytes_of(columns) + _SCALE_BYTES


def to_four_bits(pair: LowRank, whitening: Whitening | None = None) -> FourBits:
    """Round a pair to 4 bits; a direction is off by about 10 %, which the ranks that fit instead of 8 bits outweigh.

    Of each vector the outermost level is the best of eight shares of its largest magnitude. Where entries are known to
    be used together, each makes good what rounding took from those before it, as far as it can (Babai's nearest plane,
    which is GPTQ's rounding, arXiv:2210.17323). The scale is the one that fits best.

    Args:
        pair: any float dtype, finite.
        whitening: by what the error counts; None counts all entries alike, each by itself.
    """
    left, right = (None, None) if whitening is None else (whitening.left, whitening.right)
    up, up_scale = _rounded(pair.up.T.double(), left)
    down, down_scale = _rounded(pair.down.double(), right)
    scale = (up_scale * down_scale).float()[:, None].view(torch.uint8)
    return FourBits(torch.cat([_packed(up), _packed(down), scale], dim=1), pair.shape)


def _rounded(
    vectors: Float[Tensor, "rank n"], root: Tensor | None
) -> tuple[UInt8[Tensor, "rank n"], Float[Tensor, " rank"]]:
    """Levels of every entry, and the scale of every vector; errors count by `root` (n, n), lower, or (n,), or alike."""
    levels, scale = _clipped(vectors)
    if root is None or root.ndim == 1 or not len(vectors):
        return levels, scale
    levels = _nearest_plane(vectors, scale, root)
    seen, values = vectors @ root, (levels.double() - _MIDDLE) @ root
    return levels, ((seen * values).sum(dim=1) / values.square().sum(dim=1)).clamp_min(0)


def _clipped(vectors: Float[Tensor, "rank n"]) -> tuple[UInt8[Tensor, "rank n"], Float[Tensor, " rank"]]:
    """Each entry rounded by itself."""
    largest = vectors.abs().amax(dim=1) if vectors.numel() else vectors.new_zeros(len(vectors))
    best, scale = torch.zeros_like(vectors, dtype=torch.uint8), torch.zeros_like(largest)
    gained = torch.full_like(largest, -1.0)
    for clip in _CLIPS:
        levels = _levels_of(vectors, clip * largest / _MIDDLE)
        values = levels - _MIDDLE
        along, norm = (vectors * values).sum(dim=1), values.square().sum(dim=1)
        better = along.square() / norm > gained  # what the least-squares scale leaves is ||x||^2 less this
        gained = torch.where(better, along.square() / norm, gained)
        scale = torch.where(better, along / norm, scale)
        best = torch.where(better[:, None], levels.to(torch.uint8), best)
    return best, scale


def _nearest_plane(
    vectors: Float[Tensor, "rank n"], scale: Float[Tensor, " rank"], root: Float[Tensor, "n n"]
) -> UInt8[Tensor, "rank n"]:
    """Levels so that the norm of `error @ root` is small, found from the last entry to the first, block by block.

    Of that norm entry i alone decides what entries after it have left of column i of `root`.
    """
    wanted, step = vectors.T.contiguous(), scale.clamp_min(torch.finfo(torch.float64).tiny)
    levels, errors = torch.empty_like(wanted), torch.zeros_like(wanted)
    columns = root / root.diagonal()  # so that what entry i owes is the products with column i alone
    for stop in range(len(wanted), 0, -_BLOCK):
        start = max(stop - _BLOCK, 0)
        owed = columns[stop:, start:stop].T @ errors[stop:]
        for entry in range(stop - 1, start - 1, -1):
            place = entry - start
            level = owed[place].add_(wanted[entry]).div_(step).add_(_MIDDLE + 0.5).floor_().clamp_(0, 15)
            levels[entry] = level
            torch.addcmul(wanted[entry], level - _MIDDLE, scale, value=-1, out=errors[entry])
            owed[:place].addr_(columns[entry, start:entry], errors[entry])
    return levels.T.to(torch.uint8)


def _levels_of(vectors: Float[Tensor, "rank n"], step: Float[Tensor, " rank"]) -> Float[Tensor, "rank n"]:
    """The nearest levels at a distance of `step` by vector."""
    step = step.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    return (vectors / step + _MIDDLE + 0.5).floor().clamp(0, 15)


def _bytes_of(count: int) -> int:
    return (count + 1) // 2


def _packed(levels: UInt8[Tensor, "rank n"]) -> UInt8[Tensor, "rank bytes"]:
    """Two levels a byte; where the last byte has room, it is zero."""
    even = torch.nn.functional.pad(levels, (0, levels.shape[1] % 2))
    return even[:, 0::2] | (even[:, 1::2] << 4)


def _levels(packed: UInt8[Tensor, "rank bytes"], count: int) -> Float[Tensor, "rank n"]:
    """The levels that `_packed` got, in float64."""
    return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, :count].double()
