"""Task vectors and the check for values no model should have."""

import pytest
import torch

from twinmerge.errors import CheckpointError, MismatchError
from twinmerge.tensors.difference import require_finite, task_vector


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_task_vector_is_the_float32_difference(dtype: torch.dtype) -> None:
    base, expert = torch.randn(3, 4).to(dtype), torch.randn(3, 4).to(dtype)
    found = task_vector(base, expert)
    assert found.dtype == torch.float32
    assert torch.equal(found, (expert.double() - base.double()).float())


@pytest.mark.parametrize("narrow", [torch.float64, torch.float32, torch.bfloat16])
def test_task_vector_of_float64_stays_float64(narrow: torch.dtype) -> None:
    base, expert = torch.ones(2, dtype=narrow), torch.tensor([1 + 1e-12, 3.0], dtype=torch.float64)
    for found in (task_vector(base, expert), -task_vector(expert, base)):
        assert found.dtype == torch.float64
        assert torch.equal(found, expert - base.double())  # float32 would give 0 for the first


def test_task_vector_of_another_shape_is_refused() -> None:
    words = r"shape \(3, 4\) in the expert, \(4, 3\) in the base; was it fine-tuned from the same base\?"
    with pytest.raises(MismatchError, match=words):
        task_vector(torch.zeros(4, 3), torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int64, torch.bool])
def test_finite_tensors_pass(dtype: torch.dtype) -> None:
    require_finite(torch.ones(3, 4).to(dtype), "w")
    require_finite(torch.ones(0, 4).to(dtype), "w")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_nan_and_inf_are_counted_and_the_first_is_named(dtype: torch.dtype) -> None:
    tensor = torch.ones(2, 3)
    tensor[0, 2], tensor[1, 0], tensor[1, 1] = torch.nan, torch.inf, -torch.inf
    words = r"expert 'sms', 'w' has 3 NaN or Inf values, first at index \(0, 2\)"
    with pytest.raises(CheckpointError, match=words):
        require_finite(tensor.to(dtype), "expert 'sms', 'w'")


def test_nan_in_a_scalar_is_found() -> None:
    with pytest.raises(CheckpointError, match=r"w has 1 NaN or Inf values, first at index \(\)"):
        require_finite(torch.tensor(torch.nan), "w")
