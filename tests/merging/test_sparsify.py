"""DARE: what is dropped, what is kept, and that the mean does not move."""

import pytest
import torch

from tests import reference
from twinmerge.errors import RecipeError
from twinmerge.merging.sparsify import dare
from twinmerge.tensors.sparse import drop_mask, keep_random


def test_density_one_drops_nothing() -> None:
    vector = torch.randn(3, 4)
    assert torch.equal(dare(vector, density=1.0, seed=0, expert="sms", name="w"), vector)


@pytest.mark.parametrize("shape", [(), (50,), (3, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_dare_is_that_of_the_reference_given_the_draw(shape: tuple[int, ...], density: float) -> None:
    vector = torch.randn(shape)
    dropped = drop_mask(vector.numel(), density, 3, "sms", "w")
    expected = reference.dare(vector.flatten(), dropped, density).view(shape)
    assert torch.equal(dare(vector, density=density, seed=3, expert="sms", name="w"), expected)


def test_random_sparse_part_keeps_what_dare_keeps() -> None:
    vector = torch.randn(20, 30)
    expected = dare(vector, density=0.3, seed=3, expert="sms", name="w")
    assert torch.equal(keep_random(vector, 0.3, 3, "sms", "w").dense(), expected)


def test_the_mean_over_seeds_is_the_task_vector() -> None:
    vector = torch.randn(10)
    draws = torch.stack([dare(vector, density=0.5, seed=s, expert="sms", name="w") for s in range(2000)])
    # at density 0.5 a draw's standard deviation is |value|; five standard errors
    assert ((draws.mean(0) - vector).abs() <= 5 * vector.abs() / 2000**0.5).all()


def test_density_outside_its_range_is_refused() -> None:
    with pytest.raises(RecipeError, match="density is the fraction kept"):
        dare(torch.ones(3), density=0.0, seed=0, expert="sms", name="w")
