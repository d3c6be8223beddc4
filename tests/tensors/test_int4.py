"""Pairs in 4 bits: layout, how far they are off, and rounding that makes good what it took."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import reference
from twinmerge.errors import CheckpointError
from twinmerge.tensors.int4 import FourBits, direction_bytes, to_four_bits
from twinmerge.tensors.low_rank import LowRank, kept_energy, truncate
from twinmerge.tensors.whitening import Whitening


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(seed: int, out: int = 48, columns: int = 32, rank: int = 6, size: float = 1.0) -> LowRank:
    return truncate(size * drawn(out, columns, seed=seed) / columns**0.5, rank)


@pytest.mark.parametrize(("out", "columns"), [(4, 6), (5, 7), (1, 3), (300, 1)])
def test_a_direction_takes_half_a_byte_an_entry_and_its_scale(out: int, columns: int) -> None:
    stored = to_four_bits(LowRank(drawn(out, 3), drawn(3, columns)))
    assert stored.rows.shape == (3, (out + 1) // 2 + (columns + 1) // 2 + 4)
    assert stored.nbytes == 3 * direction_bytes(out, columns)
    assert stored.to(torch.float32).shape == stored.shape == (out, columns)


def test_levels_are_read_from_the_bytes_by_hand() -> None:
    scale = torch.tensor([0.5]).view(torch.uint8)
    rows = torch.cat([torch.tensor([0 | 15 << 4, 8, 7 | 8 << 4], dtype=torch.uint8), scale])[None]
    stored = FourBits.unpack({"four_bits": rows}, (3, 2))
    up, down = torch.tensor([-7.5, 7.5, 0.5]), torch.tensor([-0.5, 0.5])
    assert torch.allclose(stored.dense(), 0.5 * torch.outer(up, down))
    both = stored.to(torch.float64)
    assert both.up.norm() / up.norm() == pytest.approx(0.5**0.5) == both.down.norm() / down.norm()


@given(seed=st.integers(0, 2**16), size=st.sampled_from([1e-9, 1e-3, 0.1, 1.0, 1e5]))
def test_rounding_takes_a_fortieth_of_the_energy(seed: int, size: float) -> None:
    exact = pair(seed, size=size)
    lost = (to_four_bits(exact).dense() - exact.dense()).square().sum() / exact.dense().square().sum()
    assert lost < 0.04  # 16 levels of a normal distribution take 1.15 % of each factor (Max 1960), few entries vary


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_matrix_of_tiny_entries_does_not_vanish_in_16_bits(dtype: torch.dtype) -> None:
    stored = to_four_bits(pair(1, size=1e-6))
    assert torch.allclose(stored.to(dtype).to(torch.float32).dense(), stored.dense(), rtol=0.05, atol=1e-9)


@pytest.mark.parametrize("rank", [0, 2])
def test_directions_of_zero_and_no_directions(rank: int) -> None:
    stored = to_four_bits(LowRank(torch.zeros(4, rank), torch.eye(rank, 3)))
    assert stored.rank == rank
    assert torch.equal(stored.dense(), torch.zeros(4, 3))
    weighed = to_four_bits(LowRank(torch.zeros(4, rank), torch.eye(rank, 3)), sides_of(4, 3))
    assert torch.equal(weighed.dense(), torch.zeros(4, 3))


def test_cut_pair_is_the_pair_of_its_first_directions() -> None:
    exact = pair(2)
    stored = to_four_bits(exact)
    assert torch.equal(stored.truncate(2).rows, to_four_bits(exact.truncate(2)).rows)
    assert stored.truncate(99).rank == stored.rank


@pytest.mark.parametrize("rows", [torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 9), torch.zeros(9).byte()])
def test_bytes_that_are_no_pair_of_that_shape_are_refused(rows: Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"4-bit factors of a matrix \(4, 6\) must be bytes \(rank, 9\), found"):
        FourBits.unpack({"four_bits": rows}, (4, 6))


def sides_of(out: int, columns: int) -> Whitening:
    """Moments with a few large directions, as layers have."""

    def moment(n: int, seed: int) -> Tensor:
        seen = drawn(4 * n, n, seed=seed) @ torch.diag(torch.linspace(3, 0.1, n)) @ drawn(n, n, seed=seed + 1)
        return seen.T @ seen / len(seen)

    return Whitening.of(moment(out, 1), moment(columns, 3))


def test_rounding_by_what_counts_loses_less_of_it() -> None:
    sides, exact = sides_of(80, 130), pair(0, 80, 130, 8)  # more entries than a block

    def lost(stored: FourBits) -> float:
        return float(sides.apply(stored.to(torch.float64).dense() - exact.dense().double()).square().sum())

    assert lost(to_four_bits(exact, sides)) < 0.7 * lost(to_four_bits(exact))


@pytest.mark.parametrize("weighed", [False, True])
def test_block_by_block_is_entry_by_entry(weighed: bool) -> None:
    exact = pair(0, 70, 90, 3)
    sides = sides_of(70, 90) if weighed else None
    found = to_four_bits(exact, sides).to(torch.float64)
    for direction in range(3):
        up = reference.four_bits(exact.up[:, direction], sides.left if sides else None)
        down = reference.four_bits(exact.down[direction], sides.right if sides else None)
        assert torch.allclose(torch.outer(found.up[:, direction], found.down[direction]), torch.outer(up, down))


def test_kept_energy_is_what_every_number_of_directions_leaves() -> None:
    matrix = drawn(9, 7)
    exact = truncate(matrix, 7)
    rounded = to_four_bits(exact).to(torch.float32)
    whole = float(matrix.double().square().sum())
    for known in (matrix, exact):
        kept = kept_energy(rounded, known)
        for rank in range(8):
            left = (matrix - rounded.truncate(rank).dense()).double().square().sum()
            assert float(kept[rank]) == pytest.approx(whole - float(left), abs=1e-4 * whole)
