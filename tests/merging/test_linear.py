"""Average and task arithmetic."""

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import reference
from twinmerge.merging.linear import sum_of, task_arithmetic, weight_average


def tensors(count: int, shape: tuple[int, ...] = (3, 4), seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"expert {i}": torch.randn(shape, generator=generator) for i in range(count)}


def test_average_of_one_expert_is_that_expert() -> None:
    base, vectors = torch.randn(3, 4), tensors(1)
    assert torch.equal(weight_average(base, vectors), base + vectors["expert 0"])


def test_scaling_zero_is_the_base() -> None:
    base = torch.randn(3, 4).bfloat16()
    assert torch.equal(task_arithmetic(base, tensors(3), 0.0), base.float())


def test_scaling_one_over_the_experts_is_the_average() -> None:
    base, vectors = torch.randn(3, 4), tensors(3)
    assert torch.equal(task_arithmetic(base, vectors, 1 / 3), weight_average(base, vectors))


@given(count=st.integers(1, 6), seed=st.integers(0, 99), order=st.randoms())
def test_order_of_experts_changes_no_bit(count: int, seed: int, order: Random) -> None:
    vectors = tensors(count, seed=seed)
    names = list(vectors)
    order.shuffle(names)
    assert torch.equal(sum_of({name: vectors[name] for name in names}), sum_of(vectors))


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 2, 2)])
def test_merges_are_those_of_the_reference(count: int, shape: tuple[int, ...]) -> None:
    base = torch.randn(shape)
    vectors = tensors(count, shape)
    wide = {"w": base.double()}
    experts = {name: {"w": base.double() + vector.double()} for name, vector in vectors.items()}
    # float32 sums of at most seven terms of size one
    assert torch.allclose(weight_average(base, vectors).double(), reference.average(wide, experts)["w"], atol=1e-6)
    expected = reference.task_arithmetic(wide, experts, 0.3)["w"]
    assert torch.allclose(task_arithmetic(base, vectors, 0.3).double(), expected, atol=1e-6)


def test_half_precision_base_is_merged_in_float32() -> None:
    base = torch.ones(2).bfloat16()
    merged = task_arithmetic(base, {"a": torch.full((2,), 1e-4)}, 1.0)
    assert merged.dtype == torch.float32
    assert torch.equal(merged, torch.full((2,), 1.0) + 1e-4)  # bfloat16 would swallow it


def test_inputs_stay_as_they_were() -> None:
    base, vectors = torch.randn(3, 4), tensors(3)
    copies = {name: vector.clone() for name, vector in vectors.items()}
    before = base.clone()
    task_arithmetic(base, vectors, 0.3)
    assert torch.equal(base, before)
    assert all(torch.equal(vectors[name], copies[name]) for name in vectors)
