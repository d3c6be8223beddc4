"""Average and task arithmetic."""

import pytest
import torch

from tests import reference
from tests.merging.memory import in_dtype, merge, models
from twinmerge.merging.average import Average, Pretrained
from twinmerge.merging.method import Method
from twinmerge.merging.task_arithmetic import TaskArithmetic


def wide(count: int) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    base, experts = models(count)
    return in_dtype(base, torch.float64), {name: in_dtype(e, torch.float64) for name, e in experts.items()}


@pytest.mark.parametrize("count", [1, 2, 7])
def test_merges_are_those_of_the_reference(count: int) -> None:
    base, experts = wide(count)
    for method, expected in (
        (Pretrained(), base),
        (Average(), reference.average(base, experts)),
        (Average(weight=0.7), reference.average(base, experts)),
        (TaskArithmetic(), reference.task_arithmetic(base, experts, 0.3)),
        (TaskArithmetic(scaling=1.0, normalize=True), reference.average(base, experts)),
    ):
        merged = merge(method, base, experts)
        assert all(torch.allclose(merged[name], expected[name], rtol=1e-13, atol=1e-14) for name in base)


def test_weights_that_are_not_normalised_add_up() -> None:
    base, experts = wide(2)
    weight = {"e0": 0.25, "e1": 2.0}
    merged = merge(Average(weight=weight, normalize=False), base, experts)
    moved = merge(TaskArithmetic(weight=weight, scaling=0.5), base, experts)
    for name, start in base.items():
        first, second = experts["e0"][name], experts["e1"][name]
        assert torch.allclose(merged[name], 0.25 * first + 2 * second, rtol=1e-13)
        assert torch.allclose(moved[name], start + 0.5 * (0.25 * (first - start) + 2 * (second - start)), rtol=1e-13)


def test_scaling_zero_is_the_base() -> None:
    base, experts = models()
    merged = merge(TaskArithmetic(scaling=0.0), base, experts, dtype=torch.float32)
    assert all(torch.equal(merged[name], base[name]) for name in base)


def test_a_weight_of_zero_leaves_the_expert_out() -> None:
    base, experts = models()
    weight = {"e0": 1.0, "e1": 0.0, "e2": 2.0}
    fewer = {name: experts[name] for name in ("e0", "e2")}
    for normalize in (False, True):
        all_three = merge(TaskArithmetic(weight=weight, normalize=normalize), base, experts)
        two = merge(TaskArithmetic(weight={"e0": 1.0, "e2": 2.0}, normalize=normalize), base, fewer)
        assert all(torch.equal(all_three[name], two[name]) for name in base)


@pytest.mark.parametrize(
    "method",
    [
        Pretrained(),
        Average(),
        Average(weight={"e0": 0.2, "e1": 0.3, "e2": 0.5}, normalize=False),
        TaskArithmetic(),
        TaskArithmetic(weight={"e0": 1.0, "e1": 2.0, "e2": 3.0}, normalize=True),
    ],
)
def test_linear_methods_are_their_coefficients_times_the_task_vectors(method: Method) -> None:
    base, experts = wide(3)
    coefficients = method.coefficients(experts)
    assert coefficients is not None
    for name, merged in merge(method, base, experts).items():
        change = sum(coefficients[e] * (experts[e][name] - base[name]) for e in experts)
        assert torch.allclose(merged, base[name] + change, rtol=1e-12, atol=1e-12)


def test_an_average_that_multiplies_the_base_has_no_coefficients() -> None:
    assert Average(normalize=False).coefficients(["a", "b"]) is None


def test_half_precision_is_merged_wide_and_rounded_once() -> None:
    base, experts = {"w": torch.ones(2).bfloat16()}, {"a": {"w": torch.full((2,), 1.0 + 2**-7).bfloat16()}}
    merged = merge(TaskArithmetic(scaling=2**-9), base, experts, dtype=torch.float32)
    assert torch.equal(merged["w"], torch.full((2,), 1.0 + 2**-16))  # bfloat16 would swallow it
