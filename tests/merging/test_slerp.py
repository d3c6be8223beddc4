"""SLERP: the arc between two models."""

import math

import pytest
import torch

from tests.merging.memory import merge
from twinmerge.merging.slerp import Slerp


def slerp(t: float, base: list[float], expert: list[float], entries: int = 1000) -> list[float]:
    experts = {"a": {"w": torch.tensor(expert)}}
    return merge(Slerp(t=t), {"w": torch.tensor(base)}, experts, entries=entries)["w"].tolist()


@pytest.mark.parametrize("entries", [1, 1000])
def test_the_arc_between_right_angles_is_a_circle(entries: int) -> None:
    assert slerp(0.5, [1.0, 0.0], [0.0, 2.0], entries) == pytest.approx([math.sqrt(0.5), 2 * math.sqrt(0.5)])
    assert slerp(1 / 3, [1.0, 0.0], [0.0, 1.0], entries) == pytest.approx([math.cos(math.pi / 6), 0.5])
    assert slerp(0.0, [1.0, 0.0], [0.0, 2.0], entries) == pytest.approx([1.0, 0.0])


def test_parallel_and_zero_tensors_are_joined_by_a_straight_line() -> None:
    assert slerp(0.25, [1.0, 2.0], [3.0, 6.0]) == pytest.approx([1.5, 3.0])
    assert slerp(0.25, [1.0, 2.0], [0.0, 0.0]) == pytest.approx([0.75, 1.5])


def test_slerp_takes_one_expert() -> None:
    assert Slerp().misfit(["a"]) is None
    assert Slerp().misfit(["a", "b"]) == "slerp goes from the base to one other model, found 2 others"
