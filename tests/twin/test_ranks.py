"""How much exclusive knowledge is kept: rank policies, the best scaling, the compressions."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import reference
from twinmerge.tensors.low_rank import LowRank
from twinmerge.tensors.sparse import Sparse, drop_mask
from twinmerge.twin.ranks import Key, best_scaling, choose_ranks, compress, compress_factors
from twinmerge.twin.recipe import ExclusiveSettings


def matrices(count: int, shape: tuple[int, ...] = (12, 8), seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"expert {i}": torch.randn(shape, generator=generator) for i in range(count)}


def kept(difference: Tensor, **settings: object) -> LowRank | Sparse:
    return compress(difference, ExclusiveSettings(**settings), seed=3, expert="sms", name="weight")[0]


# ---- compression


@pytest.mark.parametrize("rank", [8, 64])
def test_rank_beyond_the_smaller_side_keeps_the_matrix_whole(rank: int) -> None:
    (difference,) = matrices(1).values()
    assert torch.allclose(kept(difference, rank=rank).dense(), difference, atol=1e-6)


@pytest.mark.parametrize("settings", [{"energy": 0.5}, {"budget": 0.1}])
def test_energy_and_budget_keep_everything_until_ranks_are_chosen(settings: dict[str, float]) -> None:
    (difference,) = matrices(1).values()
    part, values = compress(difference, ExclusiveSettings(**settings), seed=0, expert="a", name="w")
    assert isinstance(part, LowRank)
    assert part.rank == len(values) == 8


@pytest.mark.parametrize("rank", [0, 3, 99])
def test_a_rank_needs_no_singular_values_but_its_own(rank: int) -> None:
    (difference,) = matrices(1).values()
    part, values = compress(difference, ExclusiveSettings(rank=rank), seed=0, expert="a", name="w")
    assert isinstance(part, LowRank)
    assert part.rank == min(rank, 8)
    assert torch.allclose(values, torch.linalg.svdvals(difference)[:rank], atol=1e-5)


def test_convolution_is_compressed_as_out_by_the_rest() -> None:
    (difference,) = matrices(1, (6, 4, 3, 3)).values()
    part = kept(difference, rank=2)
    up, down, _ = reference.truncated_svd(difference.reshape(6, 36).double(), 2)
    assert part.shape == (6, 36)
    assert torch.allclose(part.dense().double(), up @ down, atol=1e-5)


def test_magnitude_keeps_the_largest_entries_as_they_are() -> None:
    (difference,) = matrices(1).values()
    part = kept(difference, compression="magnitude", density=0.25).dense()
    assert torch.equal(part[part != 0], difference[part != 0])
    assert int((part != 0).sum()) == 24
    assert difference[part != 0].abs().min() >= difference[part == 0].abs().max()


def test_random_keeps_the_drawn_entries_rescaled() -> None:
    (difference,) = matrices(1).values()
    part = kept(difference, compression="random", density=0.25).dense()
    dropped = drop_mask(96, 0.25, 3, "sms", "weight").view(12, 8)
    assert torch.allclose(part, reference.dare(difference, dropped, 0.25))


def test_sparse_compressions_have_no_spectrum() -> None:
    settings = ExclusiveSettings(compression="magnitude", density=0.5)
    assert compress(torch.ones(3, 4), settings, seed=0, expert="a", name="w")[1] is None


# ---- ranks

SPECTRA = st.dictionaries(
    st.tuples(st.sampled_from(["wide", "small", "tall"]), st.sampled_from(["ag", "sms"])),
    st.lists(st.floats(0, 4), min_size=1, max_size=5).map(lambda v: torch.tensor(sorted(v, reverse=True))),
    min_size=1,
)
COST = {"wide": 180, "small": 22, "tall": 140}


def chosen(spectra: dict[Key, Tensor], budget_bytes: int | None = None, **settings: float) -> dict[Key, int]:
    return choose_ranks(spectra, ExclusiveSettings(**settings), budget_bytes=budget_bytes, cost=COST)


@given(SPECTRA, st.integers(0, 8))
def test_fixed_rank_is_that_rank_or_all_there_is(spectra: dict[Key, Tensor], rank: int) -> None:
    assert chosen(spectra, rank=rank) == {key: min(rank, len(values)) for key, values in spectra.items()}


@given(SPECTRA, st.floats(0.01, 1))
def test_energy_is_reached_in_every_matrix_by_the_smallest_rank(spectra: dict[Key, Tensor], energy: float) -> None:
    for key, rank in chosen(spectra, energy=energy).items():
        squares = spectra[key].double().square()
        assert squares[:rank].sum() >= (energy - 1e-9) * squares.sum()
        assert rank == 0 or squares[: rank - 1].sum() < energy * squares.sum()


def test_all_the_energy_is_all_directions_that_are_not_zero() -> None:
    spectra = {("wide", "ag"): torch.tensor([2.0, 1.0, 0.0]), ("wide", "sms"): torch.zeros(3)}
    assert chosen(spectra, energy=1.0) == {("wide", "ag"): 2, ("wide", "sms"): 0}


@given(SPECTRA, st.integers(0, 3000))
def test_budget_is_respected_and_nothing_more_would_fit(spectra: dict[Key, Tensor], budget: int) -> None:
    ranks = chosen(spectra, budget, budget=0.1)
    cost = {key: COST[key[0]] for key in spectra}
    left = budget - sum(ranks[key] * cost[key] for key in spectra)
    assert left >= 0
    for key, values in spectra.items():
        useful = int((values > 0).sum())
        assert ranks[key] <= useful
        assert ranks[key] == useful or cost[key] > left


@given(st.lists(st.lists(st.floats(0.1, 4), min_size=3, max_size=3), min_size=2, max_size=2), st.integers(0, 6))
def test_budget_over_equal_costs_keeps_the_most_energy(values: list[list[float]], directions: int) -> None:
    spectra = {("small", str(i)): torch.tensor(sorted(v, reverse=True)).double() for i, v in enumerate(values)}
    ranks = chosen(spectra, directions * 11 * 2, budget=0.1)
    found = sum(float(spectra[key][:rank].square().sum()) for key, rank in ranks.items())
    best = max(
        sum(float(values[:rank].square().sum()) for values, rank in zip(spectra.values(), split, strict=True))
        for split in itertools.product(range(4), repeat=2)
        if sum(split) <= directions
    )
    assert found == pytest.approx(best)


@given(SPECTRA, st.integers(0, 3000))
def test_order_of_experts_changes_no_rank(spectra: dict[Key, Tensor], budget: int) -> None:
    assert chosen(dict(reversed(spectra.items())), budget, budget=0.1) == chosen(spectra, budget, budget=0.1)


# ---- the best scaling


def residual(vectors: dict[str, Tensor], direction: Tensor, scaling: float, rank: int) -> float:
    """What truncation throws away: sum_t tail_r(tau_t - scaling * direction)."""
    total = 0.0
    for vector in vectors.values():
        _, _, values = reference.truncated_svd((vector.double() - scaling * direction.double()).flatten(1), rank)
        total += float(values[rank:].square().sum())
    return total


@given(
    count=st.integers(2, 5),
    shape=st.sampled_from([(12, 8), (6, 10), (9, 2, 2, 2)]),
    rank=st.integers(1, 5),
    common=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_auto_scaling_leaves_no_more_than_any_on_the_grid_of_the_paper_and_the_mean(
    count: int, shape: tuple[int, ...], rank: int, common: float, seed: int
) -> None:
    shared = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000))
    vectors = {name: vector + common * shared for name, vector in matrices(count, shape, seed).items()}
    direction = torch.stack(list(vectors.values())).sum(0)
    auto = residual(vectors, direction, best_scaling(vectors, direction, rank), rank)
    noise = 2e-7 * min(direction.flatten(1).shape) * residual(vectors, direction, 0.0, 0)  # float32 sums of squares
    for scaling in (0.3, 1 / count):
        assert auto <= residual(vectors, direction, round(scaling, 4), rank) * (1 + 1e-6) + noise


def test_auto_scaling_beats_the_papers_where_experts_agree() -> None:
    common, *own = matrices(5, (16, 16)).values()
    vectors = {str(i): common + 0.3 * vector for i, vector in enumerate(own)}
    direction = torch.stack(list(vectors.values())).sum(0)
    auto = residual(vectors, direction, best_scaling(vectors, direction, 2), 2)
    assert auto < 0.9 * residual(vectors, direction, 0.3, 2)
    assert auto <= residual(vectors, direction, 0.25, 2) * (1 + 1e-4)


@pytest.mark.parametrize(("shape", "rank"), [((7,), 4), ((6, 5), 0), ((6, 5), 5), ((6, 5), 99)])
def test_where_truncation_decides_nothing_the_scaling_is_least_squares(shape: tuple[int, ...], rank: int) -> None:
    vectors = matrices(3, shape)
    direction = torch.stack(list(vectors.values())).sum(0)
    assert best_scaling(vectors, direction, rank) == pytest.approx(1 / 3, abs=1e-4)  # of a sum of vectors: their mean


def test_scaling_has_four_digits_so_that_sums_in_another_order_do_not_change_it() -> None:
    vectors = matrices(3)
    direction = torch.stack(list(vectors.values())).sum(0)
    found = best_scaling(vectors, direction, 2)
    assert found == round(found, 4)
    assert found == best_scaling(dict(reversed(vectors.items())), direction, 2)


def test_where_every_scaling_leaves_nothing_it_is_least_squares_not_noise() -> None:
    vectors = {"a": torch.outer(torch.arange(6.0), torch.ones(5)), "b": torch.zeros(6, 5)}
    assert best_scaling(vectors, vectors["a"], 2) == 0.5


def test_direction_of_zero_has_scaling_zero() -> None:
    assert best_scaling(matrices(2), torch.zeros(12, 8), 3) == 0.0


@pytest.mark.parametrize("settings", [{"rank": 2}, {"budget": 0.1}], ids=str)
def test_a_pair_is_compressed_as_the_matrix_that_it_stands_for(settings: dict[str, float]) -> None:
    pair = LowRank(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), torch.eye(3, 5))
    chosen = ExclusiveSettings(**settings)
    found, values = compress_factors(pair, chosen)
    whole, spectrum = compress(pair.dense(), chosen, seed=0, expert="a", name="w")
    assert torch.allclose(found.dense(), whole.dense(), atol=1e-5)
    assert torch.allclose(values[:2], spectrum[:2], atol=1e-5)
    assert found.rank == (2 if "rank" in settings else 3)
