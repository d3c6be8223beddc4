"""TIES: trimming over the whole model, sign election, disjoint mean."""

from collections.abc import Iterator, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import reference
from twinmerge.errors import RecipeError
from twinmerge.merging.ties import Stream, disjoint_mean, model_thresholds, tensor_thresholds, ties

Model = dict[str, Tensor]
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def model(seed: int, levels: float = 0) -> Model:
    """Three tensors; with `levels`, few different values, so many ties and zeros."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"bias": (5,), "conv": (2, 3, 2, 2), "weight": (4, 6)}
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: (value * levels).round() if levels else value for name, value in values.items()}


def stream_of(experts: Mapping[str, Model]) -> Stream:
    def stream() -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        for name in next(iter(experts.values())):
            yield name, {expert: tensors[name] for expert, tensors in experts.items()}

    return stream


# ---- thresholds


@given(values=st.lists(FLOATS, min_size=1, max_size=40), density=st.floats(1e-3, 1))
def test_threshold_is_the_kth_largest_magnitude_to_the_bit(values: list[float], density: float) -> None:
    vector = torch.tensor(values)
    stream = stream_of({"a": {"first": vector[: len(values) // 2], "second": vector[len(values) // 2 :]}})
    expected = sorted(vector.abs().tolist(), reverse=True)[max(1, round(density * len(values))) - 1]
    assert model_thresholds(stream, density) == {"a": expected}
    assert tensor_thresholds({"a": vector}, density) == {"a": expected}


@pytest.mark.parametrize("density", [1e-9, 0.1, 0.5, 1.0])
def test_threshold_is_found_among_values_that_share_their_upper_bits(density: float) -> None:
    vector = (torch.arange(5000, dtype=torch.int32) + 0x3F800000).view(torch.float32)[torch.randperm(5000)]
    expected = vector.sort(descending=True).values[max(1, round(density * 5000)) - 1].item()
    assert model_thresholds(stream_of({"a": {"w": vector}}), density) == {"a": expected}


def test_each_expert_has_its_own_threshold_and_may_lack_tensors() -> None:
    def stream() -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        yield "v", {"a": torch.tensor([1.0, 2.0])}
        yield "w", {"a": torch.tensor([3.0, -4.0]), "b": torch.tensor([10.0, -20.0])}

    assert model_thresholds(stream, 0.5) == {"a": 3.0, "b": 20.0}


@pytest.mark.parametrize("density", [0.0, 1.5])
def test_density_outside_its_range_is_refused(density: float) -> None:
    with pytest.raises(RecipeError, match="density is the fraction kept"):
        model_thresholds(stream_of({"a": {"w": torch.ones(3)}}), density)
    with pytest.raises(RecipeError, match="density is the fraction kept"):
        tensor_thresholds({"a": torch.ones(3)}, density)


# ---- election and mean


def test_conflicting_signs_follow_the_larger_sum() -> None:
    vectors = {"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([-1.0, -3.0]), "c": torch.tensor([1.0, 2.0])}
    assert disjoint_mean(vectors).tolist() == [2.0, -2.0]


def test_zero_sum_stays_zero() -> None:
    assert disjoint_mean({"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([-1.0, 0.0])}).tolist() == [0, 0]


def test_zeros_take_no_part_in_the_mean() -> None:
    assert disjoint_mean({"a": torch.tensor([4.0]), "b": torch.tensor([0.0]), "c": torch.tensor([2.0])}).item() == 3


def test_one_expert_at_full_density_is_that_expert() -> None:
    base, vector = torch.randn(4, 6), torch.randn(4, 6)
    assert torch.equal(ties(base, {"a": vector}, thresholds={"a": 0.0}, scaling=1.0), base + vector)


# ---- against the reference


@pytest.mark.parametrize("density", [0.05, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("levels", [0, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_ties_over_the_whole_model_is_that_of_the_reference(density: float, levels: float, count: int) -> None:
    base = model(100)
    vectors = {f"expert {i}": model(i, levels) for i in range(count)}
    thresholds = model_thresholds(stream_of(vectors), density)
    zero = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    expected = reference.ties(zero, vectors, density, 1.0)
    for name in base:
        merged = ties(base[name], {e: v[name] for e, v in vectors.items()}, thresholds=thresholds, scaling=0.5)
        # the reference adds in the same order, so elections agree; the mean differs by rounding
        assert torch.allclose(merged, base[name] + 0.5 * expected[name], atol=1e-6)


@given(seed=st.integers(0, 99), order=st.permutations(range(4)))
def test_order_of_experts_changes_no_bit(seed: int, order: list[int]) -> None:
    vectors = {f"expert {i}": model(seed + i)["weight"] for i in range(4)}
    shuffled = {f"expert {i}": vectors[f"expert {i}"] for i in order}
    assert torch.equal(disjoint_mean(shuffled), disjoint_mean(vectors))


def test_chunks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = {f"expert {i}": model(i)["weight"] for i in range(3)}
    whole = disjoint_mean(vectors)
    monkeypatch.setattr("twinmerge.merging.ties._CHUNK", 7)
    assert torch.equal(disjoint_mean(vectors), whole)
