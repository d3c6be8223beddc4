"""Pairs in 8 bits: how far they are off, and what does not fit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinmerge.errors import CheckpointError
from twinmerge.tensors.float8 import EIGHT_BITS, SCALE, to_eight_bits
from twinmerge.tensors.low_rank import LowRank, truncate


def pair(seed: int, out: int = 48, in_: int = 32, rank: int = 6, size: float = 1.0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return truncate(size * torch.randn(out, in_, generator=generator) / in_**0.5, rank)


def test_rank_zero_stays_rank_zero() -> None:
    stored = to_eight_bits(LowRank(torch.zeros(4, 0), torch.zeros(0, 3)), "it")
    assert stored.rank == 0
    assert stored.to(torch.float32).shape == (4, 3)


def test_direction_of_zero_stays_zero() -> None:
    stored = to_eight_bits(LowRank(torch.zeros(4, 2), torch.eye(2, 3)), "it")
    assert torch.equal(stored.to(torch.float32).dense(), torch.zeros(4, 3))


@given(seed=st.integers(0, 2**16), size=st.sampled_from([1e-3, 1e-2, 0.1, 1.0, 10.0]))
def test_rounding_takes_less_than_a_hundredth_of_the_energy(seed: int, size: float) -> None:
    exact = pair(seed, size=size)
    rounded = to_eight_bits(exact, "it").to(torch.float32)
    lost = (rounded.dense() - exact.dense()).square().sum() / exact.dense().square().sum()
    # entries are off by at most 1/16, a factor's by about 0.026 in the mean square: 2 * 0.026^2 = 0.0014 of the energy
    assert lost < 0.01


def test_stored_pair_times_its_scale_is_what_is_read() -> None:
    stored = to_eight_bits(pair(0), "it")
    assert stored.up.dtype == EIGHT_BITS
    by_peft = SCALE * (stored.up.float() @ stored.down.float())
    # powers of two: the same products, scaled exactly
    assert torch.equal(stored.to(torch.float32).dense(), by_peft)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_reading_is_exact_in_every_wider_dtype(dtype: torch.dtype) -> None:
    stored = to_eight_bits(pair(1, size=0.01), "it")
    read = stored.to(dtype)
    assert read.up.dtype == dtype
    assert torch.equal(read.up.float(), stored.to(torch.float32).up)


def test_both_factors_take_half_of_a_directions_length() -> None:
    read = to_eight_bits(pair(2), "it").to(torch.float32)
    # each norm is of entries rounded to 1/16
    torch.testing.assert_close(read.up.norm(dim=0), read.down.norm(dim=1), rtol=1 / 16, atol=0)


@pytest.mark.parametrize("entry", [1e9, float("nan")])
def test_entry_beyond_float8_is_refused(entry: float) -> None:
    up = torch.ones(2, 1)
    up[0] = entry
    with pytest.raises(CheckpointError, match=r"'x' does not fit 8 bits: entries must be at most 448, found .*float16"):
        to_eight_bits(LowRank(up, torch.ones(1, 2)), "'x'")
