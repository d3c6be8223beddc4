"""SLERP: the arc between two models."""

import math

import pytest
import torch

from tests.merging.memory import merge
from twinmerge.merging.slerp import Arc, Slerp


def test_the_arc_between_right_angles_is_a_circle() -> None:
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    arc = Arc.between([(first[:1], second[:1]), (first[1:], second[1:])])
    assert arc.coefficients(0.5) == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))
    assert arc.coefficients(0.0) == pytest.approx((1.0, 0.0))


def test_parallel_and_zero_tensors_are_joined_by_a_straight_line() -> None:
    tensor = torch.tensor([1.0, 2.0])
    assert Arc.between([(tensor, 3 * tensor)]).coefficients(0.25) == (0.75, 0.25)
    assert Arc.between([(tensor, torch.zeros(2))]).coefficients(0.25) == (0.75, 0.25)


@pytest.mark.parametrize("entries", [1, 1000])
def test_the_middle_of_a_quarter_circle_lies_on_it(entries: int) -> None:
    base, experts = {"w": torch.tensor([1.0, 0.0])}, {"a": {"w": torch.tensor([0.0, 1.0])}}
    merged = merge(Slerp(t=0.5), base, experts, entries=entries)["w"]
    assert torch.allclose(merged, torch.full((2,), math.sqrt(0.5), dtype=torch.float64))


def test_slerp_takes_one_expert() -> None:
    assert Slerp().misfit(["a"]) is None
    assert Slerp().misfit(["a", "b"]) == "slerp goes from the base to one other model, found 2 others"
