"""Weighted merges: the reference at equal weights, laws of weights, chunks change nothing."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import reference
from twinmerge.errors import RecipeError
from twinmerge.merging.slerp import Arc
from twinmerge.merging.weighted import weighted_average, weighted_dare, weighted_task_arithmetic, weighted_ties
from twinmerge.tensors.sparse import drop_mask


def models(count: int = 3, entries: int = 40) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base, *experts = (torch.randn(entries, generator=generator) for _ in range(count + 1))
    return base, {f"e{i}": expert for i, expert in enumerate(experts)}


def state(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {name: {"w": tensor.double()} for name, tensor in tensors.items()}


def dare(base: Tensor, experts: dict[str, Tensor], at: int = 0, *, elect: bool = False, **changed: bool) -> Tensor:
    settings = {"rescale": True, "normalize": False, **changed}
    ones, half = dict.fromkeys(experts, 1.0), dict.fromkeys(experts, 0.5)
    return weighted_dare(
        base, experts, ones, densities=half, scaling=1.0, elect=elect, seed=3, tensor="w", at=at, **settings
    )


def test_equal_weights_normalised_are_the_average() -> None:
    base, experts = models()
    merged = weighted_average(experts, dict.fromkeys(experts, 0.7), normalize=True)
    assert torch.allclose(merged, reference.average({"w": base}, state(experts))["w"], rtol=1e-14)


def test_weights_one_are_task_arithmetic() -> None:
    base, experts = models()
    merged = weighted_task_arithmetic(base, experts, dict.fromkeys(experts, 1.0), scaling=0.3, normalize=False)
    expected = reference.task_arithmetic({"w": base.double()}, state(experts), 0.3)["w"]
    assert torch.allclose(merged, expected, rtol=1e-13)


def test_weights_one_are_ties_up_to_float32() -> None:
    base, experts = models()
    thresholds = {n: float((e - base).abs().sort(descending=True).values[9]) for n, e in experts.items()}
    merged = weighted_ties(
        base, experts, dict.fromkeys(experts, 1.0), thresholds=thresholds, scaling=1.0, normalize=True
    )
    expected = reference.ties({"w": base.double()}, state(experts), 0.25, 1.0)["w"]
    assert torch.allclose(merged, expected, atol=1e-6)  # task vectors are float32


def test_dare_keeps_what_the_draw_keeps() -> None:
    base, experts = models()
    kept = [reference.dare((e - base).double(), drop_mask(len(base), 0.5, 3, n, "w"), 0.5) for n, e in experts.items()]
    assert torch.allclose(
        dare(base, experts), base.double() + sum(kept), atol=2e-6
    )  # what is kept is added up in float32
    assert torch.allclose(dare(base, experts, rescale=False), base.double() + 0.5 * sum(kept), atol=2e-6)
    assert torch.allclose(dare(base, experts, normalize=True), base.double() + sum(kept) / 3, atol=2e-6)


@pytest.mark.parametrize("elect", [False, True])
@given(cut=st.integers(1, 39))
def test_dare_does_not_depend_on_chunks(elect: bool, cut: int) -> None:
    base, experts = models()
    parts = [dare(base[a:b], {n: e[a:b] for n, e in experts.items()}, a, elect=elect) for a, b in ((0, cut), (cut, 40))]
    assert torch.equal(torch.cat(parts), dare(base, experts, elect=elect))


def test_a_weight_of_zero_leaves_the_expert_out() -> None:
    base, experts = models()
    weights = {"e0": 1.0, "e1": 0.0, "e2": 2.0}
    fewer = {name: expert for name, expert in experts.items() if name != "e1"}
    for normalize in (False, True):
        whole = weighted_task_arithmetic(base, experts, weights, scaling=1.0, normalize=normalize)
        assert torch.equal(
            whole, weighted_task_arithmetic(base, fewer, weights | {"e1": 0.0}, scaling=1.0, normalize=normalize)
        )


def test_weights_that_cancel_are_refused_when_normalised() -> None:
    experts = models(2)[1]
    weights = {"e0": 1.0, "e1": -1.0}
    with pytest.raises(RecipeError, match="must not sum to zero when they are normalised, found e0 1, e1 -1"):
        weighted_average(experts, weights, normalize=True)
    assert weighted_average(experts, weights, normalize=False).isfinite().all()


def test_the_arc_between_right_angles_is_a_circle() -> None:
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    arc = Arc.between([(first[:1], second[:1]), (first[1:], second[1:])])
    assert arc.coefficients(0.5) == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))
    assert arc.coefficients(0.0) == pytest.approx((1.0, 0.0))


def test_parallel_and_zero_tensors_are_joined_by_a_straight_line() -> None:
    tensor = torch.tensor([1.0, 2.0])
    assert Arc.between([(tensor, 3 * tensor)]).coefficients(0.25) == (0.75, 0.25)
    assert Arc.between([(tensor, torch.zeros(2))]).coefficients(0.25) == (0.75, 0.25)
