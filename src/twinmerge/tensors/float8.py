"""Stores a low-rank pair in 8 bits: balanced factors in float8, times one power of two."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from twinmerge.errors import CheckpointError
from twinmerge.tensors.low_rank import LowRank

EIGHT_BITS = torch.float8_e4m3fn
SCALE = 2.0**-12
"""Of a stored pair: `SCALE * up @ down` is the matrix, PEFT's `lora_alpha / r`."""
_FACTOR_SCALE = 2.0**-6  # SCALE, half of it in each factor; keeps usual entries where float8 is precise
_LARGEST = torch.finfo(EIGHT_BITS).max


class Quantised(LowRank):
    """A pair as it is stored in float8: the matrix is `SCALE * up @ down`, and `to` a wider dtype is exact."""

    def energy(self) -> float:
        """Squared Frobenius norm of the matrix."""
        return self.to(torch.float64).energy()

    def dense(self) -> Float[Tensor, "out in"]:
        """The matrix itself, in float32."""
        return self.to(torch.float32).dense()

    def to(self, dtype: torch.dtype) -> LowRank:
        """The pair in a wider float dtype."""
        return LowRank(*((factor.float() * _FACTOR_SCALE).to(dtype) for factor in (self.up, self.down)))


def to_eight_bits(pair: LowRank, where: str) -> Quantised:
    """Round a pair to float8 (3 bits of mantissa: an entry is off by 6 % at most, a direction by about 3 %).

    Each direction's length is shared evenly by both factors before it is rounded.

    Args:
        pair: any float dtype.
        where: how to call the pair in the message.

    Returns:
        The stored factors, `pair ≈ SCALE * up @ down`.

    Raises:
        CheckpointError: if an entry is too large for float8, which would be cut off without a word.
    """
    up, down = pair.up.double(), pair.down.double()
    lengths, other = up.norm(dim=0), down.norm(dim=1)
    share = torch.where((lengths > 0) & (other > 0), (other / lengths).sqrt(), 1.0)
    up, down = up * share / _FACTOR_SCALE, down / share[:, None] / _FACTOR_SCALE
    largest = max((float(factor.abs().max()) for factor in (up, down) if factor.numel()), default=0.0)
    if not largest <= _LARGEST:
        raise CheckpointError(
            f"{where} does not fit 8 bits: entries must be at most {_LARGEST:g}, found {largest:g}; "
            "use exclusive.dtype: float16"
        )
    return Quantised(up.to(EIGHT_BITS), down.to(EIGHT_BITS))
