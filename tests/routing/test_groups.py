"""Gates of groups: of rows that share one, and of experts that are hard to tell apart."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.routing.test_router import Features, clusters, fitted, routed, same, truth
from twinmerge.routing.calibrate import confusable_groups, confused_pairs, confusion
from twinmerge.routing.group_wise import group_gates
from twinmerge.routing.router import gate_of
from twinmerge.routing.store import load_router, save_router
from twinmerge.twin.recipe import RouterSettings

# ---- group-wise


@given(rows=st.integers(1, 80), experts=st.integers(2, 6), groups=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_groups_cover_all_rows_and_average_their_gates(rows: int, experts: int, groups: int, seed: int) -> None:
    gate = torch.rand(rows, experts, generator=torch.Generator().manual_seed(seed)).mul(4).softmax(dim=1)
    assigned, means = group_gates(gate, gate.argmax(dim=1), groups)
    bins = len(torch.unique(gate.argmax(dim=1)))
    assert assigned.shape == (rows,)
    assert bins <= len(means) <= max(groups, bins)
    assert torch.equal(torch.unique(assigned), torch.arange(len(means)))  # no group is empty
    for index, mean in enumerate(means):
        members = gate[assigned == index]
        assert torch.allclose(members.mean(dim=0), mean)
        assert len(torch.unique(members.argmax(dim=1))) == 1  # bins by argmax first


def test_twenty_groups_are_the_papers() -> None:
    routing = routed(fitted(), truth(clusters(rows=200, seed=9))[0])
    assigned, means = group_gates(routing.gate, routing.expert)
    assert len(means) == len(torch.unique(assigned)) == 20


def test_as_many_groups_as_different_gates_change_nothing() -> None:
    gate = torch.eye(3)[torch.arange(30) % 3]
    assigned, means = group_gates(gate.clamp(1e-6), gate.argmax(dim=1))
    assert torch.allclose(means[assigned], gate.clamp(1e-6))
    assert len(means) == 3


def test_same_seed_gives_the_same_groups() -> None:
    routing = routed(fitted(), truth(clusters(rows=200, seed=9))[0])
    first, second = (group_gates(routing.gate, routing.expert, 9, seed=4) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


# ---- experts that are hard to tell apart


def overlapping(seed: int = 0) -> Features:
    """Two clouds that lie half in each other, and two far from all others."""
    rows = clusters(rows=200, distance=6, seed=seed, names=("a", "b", "c", "d"))
    generator = torch.Generator().manual_seed(seed + 1)
    rows["b"] = torch.randn(200, 8, generator=generator) + 0.9 * (rows["a"].mean(dim=0) + 0.1)
    return rows


def test_experts_that_are_mixed_up_are_named_with_their_shares() -> None:
    router = fitted(overlapping())
    assert [pair["experts"] for pair in router.report["confused"]] == [["a", "b"]]
    inputs, labels = truth(overlapping(seed=5))
    chosen = routed(router, inputs).expert
    shares = confusion(chosen, labels, 4)
    assert router.report["confused"][0]["shares"] == pytest.approx([float(shares[0, 1]), float(shares[1, 0])], abs=0.2)
    assert fitted(clusters(distance=6)).report["confused"] == []


def test_gates_of_groups_mix_inside_the_likeliest_group_alone(tmp_path: Path) -> None:
    router = fitted(overlapping(), gate="groups")
    assert router.groups.tolist() == [0, 0, 2, 3]
    inputs, labels = truth(overlapping(seed=5))
    routing = routed(router, inputs)
    known = ~routing.fallback
    gate, probability = routing.gate[known], routing.probability[known]
    mixed = labels[known] < 2
    assert torch.allclose(gate.sum(dim=1), torch.ones(len(gate)))
    assert (gate[mixed][:, :2] > 0).all()
    assert (gate[mixed][:, 2:] == 0).all()
    assert torch.allclose(gate[mixed][:, 0], probability[mixed][:, 0] / probability[mixed][:, :2].sum(dim=1))
    assert (gate[~mixed].amax(dim=1) == 1).all()
    assert torch.equal(routing.expert[known], gate.argmax(dim=1))
    save_router(router, tmp_path / "router")
    assert same(routed(load_router(tmp_path / "router"), inputs), routing)


def test_group_is_chosen_by_its_sum_and_its_likeliest_expert_answers() -> None:
    settings = RouterSettings(gate="groups", features="all")
    gate = gate_of(torch.tensor([[0.3, 0.3, 0.4]]), settings, torch.tensor([0, 0, 2]))
    assert torch.allclose(gate, torch.tensor([[0.5, 0.5, 0.0]]))


def test_pairs_that_are_connected_make_one_group() -> None:
    shares = torch.eye(5)
    shares[0, 3] = shares[3, 4] = shares[1, 2] = 0.1
    assert confused_pairs(shares) == [(0, 3), (1, 2), (3, 4)]
    groups = confusable_groups(shares)
    assert [(groups == groups[i]).nonzero()[:, 0].tolist() for i in (0, 1)] == [[0, 3, 4], [1, 2]]
