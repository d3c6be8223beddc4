"""The dense reference: theta(x) = shared + sum of gate times exclusive."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import reference
from twinmerge.runtime.compose import theta
from twinmerge.tensors.low_rank import LowRank
from twinmerge.tensors.parts import Dense, Part
from twinmerge.tensors.sparse import keep_largest

SHAPES = {"weight": (5, 4), "conv": (3, 2, 2, 2), "bias": (5,)}


def random_parts(seed: int, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], list[dict[str, Part]]]:
    """A shared state, and three experts: factors, sparse parts, and nothing for some parameters."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    shared = {name: make(*shape) for name, shape in SHAPES.items()}
    experts: list[dict[str, Part]] = [
        {"weight": LowRank(make(5, 2), make(2, 4)), "conv": LowRank(make(3, 1), make(1, 8)), "bias": Dense(make(5))},
        {"weight": keep_largest(make(5, 4), 0.3), "conv": keep_largest(make(3, 8), 0.5)},
        {"bias": Dense(make(5))},
    ]
    return shared, experts


@given(st.integers(0, 99), st.lists(st.floats(-1, 2), min_size=3, max_size=3))
@settings(max_examples=25)
def test_weights_of_a_gate_are_those_of_the_reference(seed: int, gate: list[float]) -> None:
    shared, experts = random_parts(seed)
    differences = {
        str(i): {name: part.dense().reshape(SHAPES[name]) for name, part in parts.items()}
        for i, parts in enumerate(experts)
    }
    expected = reference.compose(shared, differences, {str(i): weight for i, weight in enumerate(gate)})
    for weights in (theta(shared, experts, gate), theta(shared, experts, torch.tensor(gate, dtype=torch.float64))):
        assert weights.keys() == shared.keys()
        assert all(torch.allclose(weights[name], expected[name], atol=1e-12) for name in shared)


def test_gate_of_zeros_is_the_shared_expert_and_nothing_given_is_changed() -> None:
    shared, experts = random_parts(0)
    before = {name: tensor.clone() for name, tensor in shared.items()}
    weights = theta(shared, experts, [0.0, 0.0, 0.0])
    theta(shared, experts, [1.0, 2.0, 3.0])
    assert all(torch.equal(weights[name], before[name]) for name in shared)
    assert all(torch.equal(shared[name], before[name]) for name in shared)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    shared, experts = random_parts(0, dtype)
    wide = {name: tensor.float() for name, tensor in shared.items()}
    whole = theta(wide, [{n: p.to(torch.float32) for n, p in parts.items()} for parts in experts], [0.2, 0.3, 0.5])
    found = theta(shared, experts, [0.2, 0.3, 0.5])
    assert found["weight"].dtype == dtype
    # the parts themselves are products in the stored dtype
    assert torch.allclose(found["weight"].float(), whole["weight"], atol=4 * torch.finfo(dtype).eps)


def test_gate_must_have_one_weight_an_expert() -> None:
    shared, experts = random_parts(0)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        theta(shared, experts, [1.0, 0.0])
