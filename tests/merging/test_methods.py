"""The registry: every method, its parameters, and what all of them have in common."""

import math
from collections.abc import Iterator, Mapping

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from tests import reference
from twinmerge.errors import MismatchError
from twinmerge.merging.methods import (
    METHODS,
    AverageParams,
    DareLinearParams,
    DareTiesParams,
    MergeParams,
    PretrainedParams,
    SharedParams,
    TaskArithmeticParams,
    TiesParams,
    merge_tensor,
    run_prepass,
)
from twinmerge.tensors.sparse import drop_mask

ALL = sorted(METHODS)
SCALED = [TaskArithmeticParams, TiesParams, DareLinearParams, DareTiesParams]


def models(count: int = 3) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"bias": (5,), "weight": (4, 6)}
    base, *vectors = (
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(count + 1)
    )
    return base, {f"expert {i}": vector for i, vector in enumerate(vectors)}


def merge(
    params: MergeParams, base: Mapping[str, Tensor], vectors: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    def stream() -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        for name in base:
            yield name, {expert: vector[name] for expert, vector in vectors.items()}

    stats = run_prepass(params, stream)
    return {name: merge_tensor(params, base[name], of_tensor, name=name, stats=stats) for name, of_tensor in stream()}


# ---- limit cases


def test_pretrained_is_the_base() -> None:
    base, vectors = models()
    assert all(torch.equal(tensor, base[name]) for name, tensor in merge(PretrainedParams(), base, vectors).items())


@pytest.mark.parametrize(
    "params",
    [
        AverageParams(),
        TaskArithmeticParams(scaling=1.0),
        TiesParams(density=1.0),
        TiesParams(density=1.0, scope="tensor"),
        DareLinearParams(density=1.0, scaling=1.0),
        DareTiesParams(density=1.0),
    ],
)
def test_one_expert_with_nothing_trimmed_is_that_expert(params: MergeParams) -> None:
    base, vectors = models(1)
    merged = merge(params, base, vectors)
    assert all(torch.equal(merged[name], base[name] + vectors["expert 0"][name]) for name in base)


# ---- laws of every method


@pytest.mark.parametrize("method", ALL)
def test_order_of_experts_changes_no_bit(method: str) -> None:
    base, vectors = models(4)
    params = METHODS[method].params()
    forward = merge(params, base, vectors)
    backward = merge(params, base, dict(reversed(vectors.items())))
    assert all(torch.equal(forward[name], backward[name]) for name in base)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_result_is_float32_of_the_shape_of_the_base(method: str, dtype: torch.dtype) -> None:
    base, vectors = models()
    merged = merge(METHODS[method].params(), {name: tensor.to(dtype) for name, tensor in base.items()}, vectors)
    assert all(merged[name].dtype == torch.float32 and merged[name].shape == base[name].shape for name in base)


@pytest.mark.parametrize("method", ALL)
def test_linear_methods_are_their_coefficient_times_the_sum(method: str) -> None:
    base, vectors = models(3)
    entry = METHODS[method]
    assert entry.linear == (method in {"pretrained", "average", "task_arithmetic"})
    if entry.coefficient is None:
        return
    params = entry.params()
    coefficient = entry.coefficient(params, 3)
    for name, merged in merge(params, base, vectors).items():
        assert torch.allclose(merged, base[name] + coefficient * sum(vector[name] for vector in vectors.values()))


@pytest.mark.parametrize("method", ALL)
def test_every_entry_is_named_as_its_parameters_are_and_cites_a_paper(method: str) -> None:
    entry = METHODS[method]
    assert entry.name == method == entry.params().method
    assert entry.paper.startswith("arXiv:")


# ---- against the reference


def experts_of(base: Mapping[str, Tensor], vectors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {
        expert: {name: base[name].double() + vector[name].double() for name in base}
        for expert, vector in vectors.items()
    }


def test_average_and_task_arithmetic_are_those_of_the_reference() -> None:
    base, vectors = models()
    wide = {name: tensor.double() for name, tensor in base.items()}
    experts = experts_of(base, vectors)
    for params, expected in (
        (AverageParams(), reference.average(wide, experts)),
        (TaskArithmeticParams(), reference.task_arithmetic(wide, experts, 0.3)),
    ):
        for name, merged in merge(params, base, vectors).items():
            assert torch.allclose(merged.double(), expected[name], atol=1e-6)  # float32 sums of four terms


def test_ties_over_the_model_and_per_tensor_are_those_of_the_reference() -> None:
    base, vectors = models()
    zero = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    whole = reference.ties(zero, vectors, 0.3, 1.0)
    for name, merged in merge(TiesParams(density=0.3), base, vectors).items():
        assert torch.allclose(merged, base[name] + whole[name], atol=1e-6)
    for name, merged in merge(TiesParams(density=0.3, scope="tensor"), base, vectors).items():
        alone = reference.ties({name: zero[name]}, {e: {name: v[name]} for e, v in vectors.items()}, 0.3, 1.0)
        assert torch.allclose(merged, base[name] + alone[name], atol=1e-6)


@pytest.mark.parametrize("params", [DareLinearParams(density=0.5, seed=3), DareTiesParams(density=0.5, seed=3)])
def test_dare_merges_are_those_of_the_reference_given_the_draws(params: DareLinearParams | DareTiesParams) -> None:
    base, vectors = models()
    for name, merged in merge(params, base, vectors).items():
        dropped = [
            reference.dare(vector[name].flatten(), drop_mask(vector[name].numel(), 0.5, 3, expert, name), 0.5)
            for expert, vector in vectors.items()
        ]
        linear = 0.3 * sum(dropped, torch.zeros(()))
        expected = linear if isinstance(params, DareLinearParams) else reference.elect_and_average(dropped)
        assert torch.allclose(merged, base[name] + expected.view(base[name].shape), atol=1e-6)


def test_seed_decides_what_dare_drops() -> None:
    base, vectors = models()
    merged = [merge(DareLinearParams(seed=seed), base, vectors)["weight"] for seed in (0, 0, 1)]
    assert torch.equal(merged[0], merged[1])
    assert not torch.equal(merged[0], merged[2])


# ---- the prepass


def test_only_ties_over_the_model_reads_the_model_first() -> None:
    def forbidden() -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        raise AssertionError("no prepass is needed")

    for params in (*(METHODS[name].params() for name in ALL if name != "ties"), TiesParams(scope="tensor")):
        assert run_prepass(params, forbidden) is None
    one = {"a": torch.tensor([1.0, -2.0])}
    assert run_prepass(TiesParams(density=0.5), lambda: iter([("w", one)])) == {"a": 2.0}


def test_ties_without_its_prepass_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the thresholds of run_prepass"):
        merge_tensor(TiesParams(), torch.zeros(2), {"a": torch.ones(2)}, name="w")


# ---- what merge_tensor refuses


def test_no_task_vector_is_refused() -> None:
    with pytest.raises(ValueError, match="'w' has no task vector to merge"):
        merge_tensor(AverageParams(), torch.zeros(2), {}, name="w")


def test_task_vector_of_another_shape_is_refused() -> None:
    words = r"expert 'sms', 'w': task vector of shape \(3,\), base \(2,\)"
    with pytest.raises(MismatchError, match=words):
        merge_tensor(AverageParams(), torch.zeros(2), {"sms": torch.ones(3)}, name="w")


@pytest.mark.parametrize("params", SCALED)
def test_auto_scaling_must_be_replaced_before_merging(params: type[MergeParams]) -> None:
    automatic = params.model_validate({"scaling": "auto"})
    with pytest.raises(ValueError, match=f"{automatic.method}: scaling 'auto' must be replaced by a number"):
        merge_tensor(automatic, torch.zeros(2), {"a": torch.ones(2)}, name="w", stats={"a": 0.0})
    resolved = automatic.model_copy(update={"scaling": 0.0})
    assert merge_tensor(resolved, torch.zeros(2), {"a": torch.ones(2)}, name="w", stats={"a": 0.0}).tolist() == [0, 0]


# ---- parameters


@pytest.mark.parametrize("method", ALL)
def test_parameters_are_chosen_by_the_method_and_survive_json(method: str) -> None:
    adapter: TypeAdapter[MergeParams] = TypeAdapter(SharedParams)
    params = adapter.validate_python({"method": method})
    assert params == METHODS[method].params()
    assert adapter.validate_json(adapter.dump_json(params)) == params


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "magic"}, "does not match any of the expected tags"),
        ({"method": "ties", "densty": 0.2}, "Extra inputs are not permitted"),
        ({"method": "ties", "density": 0}, "greater than 0"),
        ({"method": "ties", "density": 20}, "less than or equal to 1"),
        ({"method": "ties", "density": math.nan}, "density"),
        ({"method": "ties", "density": "0.2"}, "valid number"),
        ({"method": "ties", "scope": "layer"}, "'model' or 'tensor'"),
        ({"method": "task_arithmetic", "scaling": math.inf}, "finite number"),
        ({"method": "task_arithmetic", "scaling": "best"}, "'auto'"),
        ({"method": "task_arithmetic", "scaling": True}, "valid number"),
        ({"method": "dare_linear", "seed": -1}, "greater than or equal to 0"),
        ({"method": "dare_ties", "seed": 1.5}, "valid integer"),
        ({"method": "average", "scaling": 1}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_parameters_are_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TypeAdapter(SharedParams).validate_python(given)


def test_whole_numbers_are_taken_for_floats() -> None:
    assert TaskArithmeticParams(scaling=1).scaling == 1.0
    assert TiesParams(density=1).density == 1.0


def test_parameters_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TiesParams().density = 0.5
