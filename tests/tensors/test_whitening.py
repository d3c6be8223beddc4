"""Directions weighed by moments: the best approximation in the norm that counts, whatever the sides look like."""

import pytest
import torch
from torch import Tensor

from tests import reference
from twinmerge.tensors.low_rank import LowRank, decompose
from twinmerge.tensors.whitening import Whitening

OUT, IN = 7, 5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moment(n: int, seed: int, *, diagonal: bool) -> Tensor:
    rows = drawn(2 * n, n, seed=seed)
    return rows.square().mean(dim=0) if diagonal else rows.T @ rows / len(rows)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_pair_is_the_best_of_its_rank_in_the_norm_of_the_moments(left: bool, right: bool) -> None:
    difference = drawn(OUT, IN, seed=5)
    moments = moment(OUT, 1, diagonal=left), moment(IN, 2, diagonal=right)
    sides = Whitening.of(*moments)
    pair = sides.undo(decompose(sides.apply(difference), 2)[0], torch.float32)
    expected = reference.weighed_low_rank(difference, *moments, 2)
    assert torch.allclose(pair.dense().double(), expected, atol=1e-5)


def test_whitened_product_is_that_of_its_whitened_factors() -> None:
    pair = LowRank(drawn(OUT, 3), drawn(3, IN, seed=1))
    sides = Whitening.of(moment(OUT, 1, diagonal=False), moment(IN, 2, diagonal=True))
    whitened = sides.apply_up(pair.up) @ sides.apply_down(pair.down)
    assert torch.allclose(whitened, sides.apply(pair.dense()), atol=1e-5)
    undone = sides.undo(LowRank(sides.apply_up(pair.up), sides.apply_down(pair.down)), torch.float32)
    assert torch.allclose(undone.up, pair.up, atol=1e-5)
    assert torch.allclose(undone.down, pair.down, atol=1e-5)


def test_a_moment_of_few_rows_is_no_obstacle() -> None:
    row = drawn(1, IN)
    sides = Whitening.of(torch.eye(OUT), row.T @ row)
    difference = drawn(OUT, IN, seed=3)
    assert torch.allclose(
        sides.undo(decompose(sides.apply(difference))[0], torch.float32).dense(), difference, atol=1e-4
    )
