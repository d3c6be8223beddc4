"""Low-rank pairs: full rank gives the matrix back, less gives the best approximation."""

from itertools import product

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import reference
from twinmerge.errors import RankError
from twinmerge.tensors.low_rank import LowRank, as_matrix, compress_product, decompose, truncate

SHAPES = [(1, 1), (1, 9), (9, 1), (8, 8), (40, 7), (7, 40), (9000, 5), (5, 9000)]  # the long ones take several chunks


def matrix(out: int, in_: int, rank: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(out, in_, generator=generator, dtype=torch.float64).to(dtype)
    up, down = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((out, rank), (rank, in_)))
    return (up @ down).to(dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))


# ---- limit cases


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_full_rank_gives_the_matrix_back(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    difference = matrix(*shape, dtype=dtype)
    factors, _ = decompose(difference)
    assert factors.rank == min(shape)
    assert factors.shape == shape
    # two roundings of the factors' entries to their dtype, and the product's own
    assert relative_error(factors.dense(), difference) < tolerance


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (12, 12)])
def test_full_rank_gives_a_rank_deficient_matrix_back(shape: tuple[int, int]) -> None:
    difference = matrix(*shape, rank=3)
    factors, values = decompose(difference)
    assert relative_error(factors.dense(), difference) < 1e-6
    assert (values[3:] < 1e-6 * values[0]).all()


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_full_rank_gives_a_badly_conditioned_matrix_back(shape: tuple[int, int]) -> None:
    scales = torch.logspace(0, -12, shape[1], dtype=torch.float64)
    difference = (matrix(*shape, dtype=torch.float64) * scales).float()
    assert relative_error(decompose(difference)[0].dense(), difference) < 1e-6


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_zero_matrix_stays_zero_without_nan(shape: tuple[int, int]) -> None:
    factors, values = decompose(torch.zeros(shape))
    assert torch.equal(factors.dense(), torch.zeros(shape))
    assert torch.equal(values, torch.zeros(4))
    assert factors.up.isfinite().all()
    assert factors.down.isfinite().all()


def test_rank_zero_is_the_zero_matrix() -> None:
    factors = truncate(matrix(4, 6), rank=0)
    assert (factors.rank, factors.shape, factors.nbytes) == (0, (4, 6), 0)
    assert torch.equal(factors.dense(), torch.zeros(4, 6))


# ---- laws


@given(out=st.integers(1, 12), in_=st.integers(1, 12), seed=st.integers(0, 99), data=st.data())
def test_truncation_error_is_the_tail_of_the_spectrum(out: int, in_: int, seed: int, data: st.DataObject) -> None:
    difference = matrix(out, in_, seed=seed, dtype=torch.float64)
    rank = data.draw(st.integers(0, min(out, in_)))
    factors, values = decompose(difference, rank)
    tail = values[rank:].square().sum().sqrt()
    # a Gram matrix in float64 resolves singular values to about 1e-8 of the largest
    assert float((factors.dense() - difference).norm()) == pytest.approx(float(tail), abs=1e-7 * float(values[0]))


@given(out=st.integers(1, 12), in_=st.integers(1, 12), seed=st.integers(0, 99))
def test_slicing_full_factors_is_truncating_the_matrix(out: int, in_: int, seed: int) -> None:
    difference = matrix(out, in_, seed=seed, dtype=torch.float64)
    full, values = decompose(difference)
    for rank in range(min(out, in_) + 1):
        sliced, direct = full.truncate(rank), truncate(difference, rank)
        assert torch.allclose(sliced.up, direct.up)
        assert torch.allclose(sliced.down, direct.down)
    assert (values.diff() <= 0).all()


@given(out=st.integers(1, 12), in_=st.integers(1, 12), seed=st.integers(0, 99))
def test_down_is_orthonormal_and_up_carries_the_singular_values(out: int, in_: int, seed: int) -> None:
    factors, values = decompose(matrix(out, in_, seed=seed, dtype=torch.float64))
    identity = torch.eye(factors.rank, dtype=torch.float64)
    clear = values > 1e-5 * values[0]  # directions of noise are not orthogonal
    assert torch.allclose((factors.down @ factors.down.T)[clear][:, clear], identity[clear][:, clear], atol=1e-6)
    assert torch.allclose(factors.up.norm(dim=0), values, atol=1e-7 * float(values[0]))


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (30, 1), (1, 30)])
def test_largest_entry_of_every_right_vector_is_positive(shape: tuple[int, int]) -> None:
    down = decompose(matrix(*shape))[0].down
    assert (down.gather(1, down.abs().argmax(1, keepdim=True)) > 0).all()


def test_same_matrix_gives_the_same_bits() -> None:
    first, second = decompose(matrix(30, 20))[0], decompose(matrix(30, 20))[0]
    assert torch.equal(first.up, second.up)
    assert torch.equal(first.down, second.down)


# ---- against the reference


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (12, 12)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_truncation_is_that_of_the_reference_svd(shape: tuple[int, int], rank: int) -> None:
    difference = matrix(*shape, dtype=torch.float64)
    factors, values = decompose(difference, rank)
    up, down, expected = reference.truncated_svd(difference, rank)
    assert torch.allclose(factors.dense(), up @ down, atol=1e-7)  # Gram matrix: half of float64's digits
    assert torch.allclose(values, expected, atol=1e-7)


def with_spectrum(out: int, in_: int, spectrum: str) -> Tensor:
    """A matrix whose singular values fall as their name says; `signal` is four directions in noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(out, in_, generator=generator)
    if spectrum == "noise":
        return noise
    if spectrum == "signal":
        return noise + torch.randn(out, 4, generator=generator) @ torch.randn(4, in_, generator=generator)
    count = torch.arange(min(out, in_))
    values = {"slow": (count + 1.0) ** -0.5, "fast": (count / -5.0).exp(), "few": (count < 3).float()}[spectrum]
    left, _, right = torch.linalg.svd(noise, full_matrices=False)
    return (left * values) @ right


@pytest.mark.parametrize("shape", [(160, 160), (300, 120), (120, 300)])
@pytest.mark.parametrize("spectrum", ["noise", "signal", "slow", "fast", "few"])
@pytest.mark.parametrize("rank", [1, 6])
def test_leading_directions_leave_at_most_a_percent_more_than_the_best(
    shape: tuple[int, int], spectrum: str, rank: int
) -> None:
    difference = with_spectrum(*shape, spectrum)
    up, down, _ = reference.truncated_svd(difference.double(), rank)
    best = float((up @ down - difference).square().sum())
    found = truncate(difference, rank).to(torch.float64)
    left = float((found.dense() - difference).square().sum())
    assert left <= 1.01 * best + 1e-9 * float(difference.square().sum())  # float32's own noise where nothing is left
    identity = torch.eye(rank, dtype=torch.float64)
    live = found.up.norm(dim=0) > 1e-4 * found.up.norm()  # a rank above the matrix' own has directions of noise
    assert torch.allclose((found.down @ found.down.T)[live][:, live], identity[live][:, live], atol=1e-5)


@pytest.mark.parametrize(("shape", "rank"), [((60, 60), 23), ((300, 80), 40), ((12, 40), 1)])
def test_a_rank_that_is_no_small_part_is_decomposed_exactly(shape: tuple[int, int], rank: int) -> None:
    difference = matrix(*shape)
    found, exact = truncate(difference, rank), decompose(difference, rank)[0]
    assert torch.equal(found.up, exact.up)
    assert torch.equal(found.down, exact.down)


def test_directions_that_are_not_orthonormal_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    difference = matrix(120, 100, rank=4)
    exact = decompose(difference, 6)[0]
    monkeypatch.setattr("twinmerge.tensors.low_rank._orthonormal", lambda block, basis: block)
    assert torch.equal(truncate(difference, 6).up, exact.up)


def test_the_search_has_the_same_bits_for_the_same_seed() -> None:
    difference = with_spectrum(160, 160, "signal")
    first, again, other = (truncate(difference, 4, seed) for seed in (1, 1, 2))
    assert torch.equal(first.up, again.up)
    assert torch.equal(first.down, again.down)
    assert not torch.equal(first.up, other.up)


def test_the_search_finds_nothing_in_a_zero_matrix() -> None:
    found = truncate(torch.zeros(100, 120), 4)
    assert torch.equal(found.dense(), torch.zeros(100, 120))
    assert found.down.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_decomposed_without_its_rounding(dtype: torch.dtype) -> None:
    difference = matrix(20, 10, dtype=dtype)
    factors, values = decompose(difference)
    assert {factors.up.dtype, factors.down.dtype, values.dtype} == {torch.float32}
    assert relative_error(factors.dense(), difference) < 1e-6


# ---- sums of products


@given(
    out=st.integers(1, 10),
    in_=st.integers(1, 10),
    ranks=st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_products_through_qr_are_the_dense_svd(
    out: int, in_: int, ranks: list[int], seed: int, data: st.DataObject
) -> None:
    ups = [matrix(out, k, seed=seed + i, dtype=torch.float64) for i, k in enumerate(ranks)]
    downs = [matrix(k, in_, seed=seed - 1 - i, dtype=torch.float64) for i, k in enumerate(ranks)]
    dense = sum((up @ down for up, down in zip(ups, downs, strict=True)), torch.zeros(out, in_, dtype=torch.float64))
    rank = data.draw(st.none() | st.integers(0, min(out, in_)))
    factors, values = compress_product(ups, downs, rank)
    up, down, expected = reference.truncated_svd(dense, min(out, in_) if rank is None else rank)
    scale = float(expected[0])
    assert len(values) == min(out, in_, sum(ranks))
    assert torch.allclose(values, expected[: len(values)], atol=1e-12 * max(scale, 1))
    error = (factors.dense() - dense).norm()
    assert float(error) == pytest.approx(float((up @ down - dense).norm()), abs=1e-10 * max(scale, 1))


def test_no_matrix_of_out_by_in_is_formed() -> None:
    size = 200_000  # out x in would be 160 GB
    up, down = matrix(size, 4), matrix(4, size)
    factors, values = compress_product([up, up], [down, -0.5 * down], rank=2)
    assert factors.shape == (size, size)
    assert len(values) == 8
    probe = matrix(size, 1, seed=9, dtype=torch.float64)
    full = compress_product([up, up], [down, -0.5 * down])[0].to(torch.float64)
    assert relative_error(full.up @ (full.down @ probe), 0.5 * up.double() @ (down.double() @ probe)) < 1e-5


def test_rank_above_the_factors_keeps_all_there_are() -> None:
    factors, values = compress_product([matrix(6, 2)], [matrix(2, 7)], rank=5)
    assert factors.rank == len(values) == 2


def test_products_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RankError, match=r"must have one shape \(out, in\), found \[\(6, 7\), \(6, 8\)\]"):
        compress_product([matrix(6, 2), matrix(6, 2)], [matrix(2, 7), matrix(2, 8)])
    with pytest.raises(RankError, match="found none"):
        compress_product([], [])


# ---- ranks, shapes, bytes


@pytest.mark.parametrize("rank", [-1, 5, True])
def test_rank_outside_its_range_is_refused(rank: int) -> None:
    words = f"rank must be an integer from 0 to 4, the smaller side of the matrix, found {rank}"
    for attempt in (
        lambda: decompose(matrix(4, 6), rank),
        lambda: truncate(matrix(6, 4), rank),
        lambda: compress_product([matrix(4, 6)], [matrix(6, 6)], rank),
        lambda: decompose(matrix(4, 6))[0].truncate(rank),
    ):
        with pytest.raises(RankError, match=words):
            attempt()


def test_rank_that_is_no_integer_is_refused() -> None:
    with pytest.raises((RankError, jaxtyping.TypeCheckError)):  # the second under the runtime type checker
        truncate(matrix(4, 6), 1.5)


@pytest.mark.parametrize(
    ("up", "down"),
    [
        (torch.zeros(4, 2), torch.zeros(3, 5)),
        (torch.zeros(4), torch.zeros(4, 5)),
        (torch.zeros(4, 2), torch.zeros(2)),
        (torch.zeros(4, 2), torch.zeros(2, 5, dtype=torch.float64)),
    ],
)
def test_factors_that_do_not_fit_are_refused(up: Tensor, down: Tensor) -> None:
    with pytest.raises(RankError, match=r"factors must be \(out, rank\) and \(rank, in\) of one dtype, found"):
        LowRank(up, down)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bytes_are_those_of_both_factors(dtype: torch.dtype) -> None:
    factors = truncate(matrix(10, 20), rank=3).to(dtype)
    assert {factors.up.dtype, factors.down.dtype} == {dtype}
    assert factors.nbytes == 3 * (10 + 20) * dtype.itemsize


def test_truncated_factors_own_their_memory() -> None:
    full = decompose(matrix(10, 20))[0]
    cut = full.truncate(2)
    assert cut.up.is_contiguous()
    assert cut.down.is_contiguous()


def test_convolution_becomes_a_matrix_of_its_rows() -> None:
    kernel = torch.randn(4, 3, 2, 2)
    assert as_matrix(kernel).shape == (4, 12)
    assert torch.equal(as_matrix(kernel)[1], kernel[1].flatten())
    square = torch.randn(4, 3)
    assert torch.equal(as_matrix(square), square)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_vector_is_no_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises((ValueError, jaxtyping.TypeCheckError)):
        as_matrix(torch.zeros(shape))


def test_every_side_may_be_the_longer_one() -> None:
    for out, in_ in product((1, 2, 3), repeat=2):
        factors, values = decompose(matrix(out, in_))
        assert factors.shape == (out, in_)
        assert len(values) == min(out, in_)
