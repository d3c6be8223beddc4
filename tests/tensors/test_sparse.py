"""Sparse parts: exact counts, exact entries, and draws that depend on nothing but their key."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twinmerge.errors import InputError, RecipeError
from twinmerge.tensors.sparse import Sparse, drop_mask, keep_largest, keep_random, kept_count, kth_magnitude

DENSITIES = st.floats(1e-3, 1)


def matrix(out: int, in_: int, seed: int = 0) -> Tensor:
    return torch.randn(out, in_, generator=torch.Generator().manual_seed(seed))


def test_density_one_keeps_everything() -> None:
    difference = matrix(5, 7)
    assert torch.equal(keep_largest(difference, 1.0).dense(), difference)
    assert torch.equal(keep_random(difference, 1.0, 0, "sms", "w").dense(), difference)


@given(
    out=st.integers(1, 8), in_=st.integers(1, 8), density=DENSITIES, seed=st.integers(0, 9), levels=st.integers(1, 9)
)
def test_exactly_the_largest_entries_stay(out: int, in_: int, density: float, seed: int, levels: int) -> None:
    difference = (matrix(out, in_, seed) * levels).round()  # few levels: many ties
    sparse = keep_largest(difference, density)
    flat = difference.flatten().tolist()
    expected = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))[: max(1, round(density * len(flat)))]
    assert sparse.indices.tolist() == sorted(expected)
    assert sparse.values.tolist() == [flat[i] for i in sorted(expected)]


def test_of_equal_entries_the_first_stay() -> None:
    assert keep_largest(torch.tensor([[1.0, -1.0], [1.0, 2.0]]), 0.5).indices.tolist() == [0, 3]


def test_a_tiny_density_keeps_one_entry() -> None:
    assert keep_largest(torch.tensor([[1.0, -5.0, 2.0]]), 1e-9).dense().tolist() == [[0, -5, 0]]


@pytest.mark.parametrize("density", [0.0, -0.5, 20.0, float("nan")])
def test_density_outside_its_range_is_refused(density: float) -> None:
    words = r"density is the fraction kept and must be in \(0, 1\], found"
    with pytest.raises(RecipeError, match=words):
        kept_count(10, density)
    with pytest.raises(RecipeError, match=words):
        keep_largest(matrix(2, 2), density)
    with pytest.raises(RecipeError, match=words):
        keep_random(matrix(2, 2), density, 0, "sms", "w")


@given(values=st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=30), data=st.data())
def test_kth_magnitude_is_that_of_the_sorted_list(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    assert kth_magnitude(torch.tensor(values), k) == sorted(map(abs, values), reverse=True)[k - 1]


def test_bytes_are_those_of_indices_and_values() -> None:
    sparse = keep_largest(matrix(10, 10), 0.2)
    assert sparse.nbytes == 20 * (4 + 4)
    assert sparse.to(torch.bfloat16).nbytes == 20 * (4 + 2)
    assert sparse.to(torch.bfloat16).dense().dtype == torch.bfloat16


def test_a_matrix_beyond_int32_is_refused() -> None:
    nothing = torch.zeros(0, dtype=torch.int32)
    with pytest.raises(InputError, match=r"fewer than 2\^31 entries, found shape \(65536, 32768\)"):
        Sparse(nothing, torch.zeros(0), (65536, 32768))


# ---- draws


@given(numel=st.integers(1, 60), cuts=st.sets(st.integers(0, 60)), density=DENSITIES)
def test_the_draw_does_not_depend_on_its_chunks(numel: int, cuts: set[int], density: float) -> None:
    whole = drop_mask(numel, density, 3, "sms", "w")
    bounds = sorted({0, numel, *(cut for cut in cuts if cut < numel)})
    parts = [drop_mask(numel, density, 3, "sms", "w", a, b) for a, b in pairwise(bounds)]
    assert torch.equal(torch.cat(parts), whole)


def test_the_draw_does_not_depend_on_the_chunk_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drop_mask(1000, 0.5, 3, "sms", "w", start=5)
    monkeypatch.setattr("twinmerge.tensors.sparse._CHUNK", 7)
    assert torch.equal(drop_mask(1000, 0.5, 3, "sms", "w", start=5), whole)


def test_the_draw_depends_on_seed_expert_and_tensor() -> None:
    keys = [(0, "sms", "w"), (1, "sms", "w"), (0, "smsw", ""), (0, "sms", "v"), (0, "news", "w")]
    masks = {tuple(drop_mask(200, 0.5, *key).tolist()) for key in keys}
    assert len(masks) == len(keys)


def test_the_draw_is_the_same_in_every_release() -> None:
    kept = (~drop_mask(64, 0.25, 0, "sms", "encoder.weight")).nonzero().squeeze(1).tolist()
    assert kept == [10, 14, 16, 19, 25, 31, 35, 38, 39, 41, 43, 46, 50]


@pytest.mark.parametrize("density", [0.01, 0.2, 0.9])
def test_the_share_kept_is_the_density(density: float) -> None:
    numel = 200_000
    kept = numel - int(drop_mask(numel, density, 0, "sms", "w").sum())
    assert abs(kept - density * numel) < 5 * (numel * density * (1 - density)) ** 0.5  # five standard deviations


def test_kept_entries_are_divided_by_the_density() -> None:
    difference = matrix(20, 20)
    dropped = drop_mask(400, 0.25, 7, "sms", "w").view(20, 20)
    expected = torch.where(dropped, torch.zeros(()), difference * 4)
    assert torch.equal(keep_random(difference, 0.25, 7, "sms", "w").dense(), expected)
