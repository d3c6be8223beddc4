"""DARE: what is dropped, what is kept, and that the mean does not move."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import reference
from tests.merging.memory import merge, models
from twinmerge.merging.dare import DareLinear, DareTies
from twinmerge.merging.method import Chunk
from twinmerge.merging.statistics import Statistics
from twinmerge.tensors.sparse import drop_mask, keep_random


def kept(base: Tensor, expert: Tensor, name: str, of: str, density: float = 0.5, seed: int = 3) -> Tensor:
    """A dropped and rescaled task vector by the reference, given the draw."""
    vector = (expert - base).flatten()
    return reference.dare(vector, drop_mask(vector.numel(), density, seed, of, name), density).view(base.shape)


@pytest.mark.parametrize(
    ("rescale", "normalize", "factor"), [(True, False, 1), (False, False, 0.5), (True, True, 1 / 3)]
)
def test_dare_linear_adds_up_what_the_draw_keeps(rescale: bool, normalize: bool, factor: float) -> None:
    base, experts = models()
    method = DareLinear(density=0.5, seed=3, scaling=1.0, rescale=rescale, normalize=normalize)
    for name, merged in merge(method, base, experts).items():
        total = sum(kept(base[name], state[name], name, e) for e, state in experts.items())
        assert torch.allclose(merged.float(), base[name] + factor * total, atol=2e-6)  # added up in float32


def test_dare_ties_elects_among_what_the_draw_keeps() -> None:
    base, experts = models()
    for name, merged in merge(DareTies(density=0.5, seed=3), base, experts).items():
        vectors = [kept(base[name], state[name], name, e).flatten() for e, state in experts.items()]
        expected = reference.elect_and_average(vectors).view(base[name].shape)
        assert torch.allclose(merged.float(), base[name] + expected, atol=1e-6)


def test_each_expert_has_its_own_density() -> None:
    base, experts = models(2)
    density = {"e0": 0.5, "e1": 0.25}
    merged = merge(DareLinear(density=density, seed=3, scaling=1.0), base, experts)
    for name in base:
        parts = [kept(base[name], experts[e][name], name, e, density[e]) for e in experts]
        assert torch.allclose(merged[name].float(), base[name] + sum(parts), atol=2e-6)


@given(entries=st.integers(1, 30), ties=st.booleans())
def test_draws_do_not_depend_on_chunks(entries: int, ties: bool) -> None:
    base, experts = models()
    method = DareTies() if ties else DareLinear()
    parts, once = merge(method, base, experts, entries=entries), merge(method, base, experts)
    assert all(torch.equal(parts[name], once[name]) for name in base)


def test_random_sparse_part_keeps_what_dare_keeps() -> None:
    vector = torch.randn(20, 30)
    chunk = Chunk("w", 0, torch.zeros(20, 30), {"sms": vector})
    merged = DareLinear(density=0.3, seed=3, scaling=1.0).merge(chunk, Statistics()).float()
    assert torch.allclose(keep_random(vector, 0.3, 3, "sms", "w").dense(), merged, rtol=1e-6)


def test_the_mean_over_seeds_is_the_task_vector() -> None:
    vector = torch.randn(10)
    chunk = Chunk("w", 0, torch.zeros(10), {"sms": vector})
    draws = [DareLinear(density=0.5, seed=s, scaling=1.0).merge(chunk, Statistics()) for s in range(2000)]
    # at density 0.5 a draw's standard deviation is |value|; five standard errors
    assert ((torch.stack(draws).mean(0) - vector).abs() <= 5 * vector.abs() / 2000**0.5).all()


def test_seed_decides_what_is_dropped() -> None:
    base, experts = models()
    merged = [merge(DareLinear(seed=seed), base, experts)["weight"] for seed in (0, 0, 1)]
    assert torch.equal(merged[0], merged[1])
    assert not torch.equal(merged[0], merged[2])
