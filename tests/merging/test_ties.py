"""TIES: trimming over the whole model, sign election, disjoint mean."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import reference
from tests.merging.memory import in_dtype, merge, models
from twinmerge.errors import RecipeError
from twinmerge.merging.method import Chunk, Chunks, find_method
from twinmerge.merging.statistics import Statistics
from twinmerge.merging.ties import Ties, elect, thresholds

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def stream(*parts: dict[str, Tensor]) -> Chunks:
    """Chunks of task vectors, the base being zero."""

    def chunks() -> Iterator[Chunk]:
        for vectors in parts:
            yield Chunk("w", 0, None, {}, vectors)

    return chunks


# ---- thresholds


@given(values=st.lists(FLOATS, min_size=2, max_size=40), density=st.floats(1e-3, 0.999))
def test_threshold_is_the_kth_largest_magnitude_to_the_bit(values: list[float], density: float) -> None:
    vector = torch.tensor(values)
    chunks = stream({"a": vector[: len(values) // 2]}, {"a": vector[len(values) // 2 :]})
    expected = sorted(vector.abs().tolist(), reverse=True)[max(1, round(density * len(values))) - 1]
    assert thresholds(chunks, density) == {"a": expected}
    assert torch.equal(vector, torch.tensor(values))


@pytest.mark.parametrize("density", [1e-9, 0.1, 0.5, 0.9999])
def test_threshold_is_found_among_values_that_share_their_upper_bits(density: float) -> None:
    vector = (torch.arange(5000, dtype=torch.int32) + 0x3F800000).view(torch.float32)[torch.randperm(5000)]
    expected = vector.sort(descending=True).values[max(1, round(density * 5000)) - 1].item()
    assert thresholds(stream({"a": vector}), density) == {"a": expected}


def test_each_expert_has_its_own_threshold_and_density() -> None:
    chunks = stream({"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, -4.0]), "b": torch.tensor([10.0, -20.0])})
    assert thresholds(chunks, 0.5) == {"a": 3.0, "b": 20.0}
    assert thresholds(chunks, {"a": 0.25, "b": 0.5}) == {"a": 4.0, "b": 20.0}
    assert thresholds(chunks, {"a": 1.0, "b": 0.5}) == {"b": 20.0}


def test_nothing_is_read_where_nothing_is_trimmed() -> None:
    def forbidden() -> Iterator[Chunk]:
        raise AssertionError("no pass is needed")

    assert thresholds(forbidden, 1.0) == thresholds(forbidden, {"a": 1.0}) == {}
    assert Ties(scope="tensor").prepass(forbidden) is None
    assert Ties().measure(forbidden, Statistics()) is None


@pytest.mark.parametrize("density", [0.0, 1.5])
def test_density_outside_its_range_is_refused(density: float) -> None:
    with pytest.raises(RecipeError, match="density is the fraction kept"):
        thresholds(stream({"a": torch.ones(3)}), density)


def test_ties_without_its_thresholds_is_refused() -> None:
    chunk = Chunk("w", 0, torch.zeros(2), {"a": torch.ones(2)})
    with pytest.raises(ValueError, match="ties needs its thresholds"):
        Ties().merge(chunk, Statistics())


# ---- election and mean


def elected(*vectors: list[float], normalize: bool = True) -> list[float]:
    named = {f"e{i}": torch.tensor(vector) for i, vector in enumerate(vectors)}
    return elect(named, dict.fromkeys(named, 1.0), normalize=normalize).tolist()


def test_conflicting_signs_follow_the_larger_sum() -> None:
    assert elected([3.0, -1.0], [-1.0, -3.0], [1.0, 2.0]) == [2.0, -2.0]
    assert elected([3.0, -1.0], [-1.0, -3.0], [1.0, 2.0], normalize=False) == [4.0, -4.0]


@pytest.mark.parametrize("name", ["ties", "dare_ties"])
@pytest.mark.parametrize("normalize", [True, False])
def test_an_entry_whose_elected_sum_is_zero_stays_the_bases(name: str, normalize: bool) -> None:
    """Signs cancel: the paper's sgn(0) is 0, so nobody agrees; mergekit counts it as positive."""
    base = {"w": torch.tensor([5.0, 5.0, 5.0])}
    experts = {"a": {"w": torch.tensor([6.0, 4.0, 5.0])}, "b": {"w": torch.tensor([4.0, 6.0, 7.0])}}
    method = find_method(name).model_validate({"density": 1.0, "normalize": normalize})
    assert merge(method, base, experts)["w"].tolist() == [5.0, 5.0, 7.0]


def test_zeros_take_no_part_in_the_mean() -> None:
    assert elected([4.0], [0.0], [2.0]) == [3.0]


# ---- against the reference


@pytest.mark.parametrize("density", [0.05, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("levels", [0, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_ties_over_the_whole_model_is_that_of_the_reference(density: float, levels: float, count: int) -> None:
    base, experts = models(count, seed=count)
    base = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    if levels:  # few different values, so many ties and zeros
        experts = {e: {name: (t * levels).round() for name, t in state.items()} for e, state in experts.items()}
    merged = merge(Ties(density=density, scaling=0.5), base, experts)
    expected = reference.ties(base, experts, density, 0.5)
    # the reference adds in the same order, so elections agree; the mean differs by rounding
    assert all(torch.allclose(merged[name].float(), expected[name], atol=1e-6) for name in base)


def test_ties_within_tensors_is_that_of_the_reference() -> None:
    base, experts = models()
    base = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    for name, merged in merge(Ties(density=0.3, scope="tensor"), base, experts).items():
        alone = reference.ties({name: base[name]}, {e: {name: s[name]} for e, s in experts.items()}, 0.3, 1.0)
        assert torch.allclose(merged.float(), alone[name], atol=1e-6)


def test_weights_take_part_in_the_election_and_in_the_mean() -> None:
    base = {"w": torch.zeros(1)}
    experts = {"a": {"w": torch.tensor([1.0])}, "b": {"w": torch.tensor([-2.0])}}
    method = Ties(density=1.0, weight={"a": 3.0, "b": 1.0})
    assert merge(method, base, experts)["w"].tolist() == [1.0]
    assert merge(method.model_copy(update={"normalize": False}), base, experts)["w"].tolist() == [3.0]


def test_float64_models_are_trimmed_by_their_differences_in_float64() -> None:
    base, experts = {"w": torch.full((2,), 1e8, dtype=torch.float64)}, {"a": {"w": torch.tensor([1e8 + 1, 1e8 + 2])}}
    experts = {"a": in_dtype({"w": base["w"] + torch.tensor([1.0, 2.0])}, torch.float64)}
    assert merge(Ties(density=0.5), base, experts)["w"].tolist() == [1e8, 1e8 + 2]
