"""The systems that papers compare with, each against its slow formula, and what is particular to each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.merging.memory import in_dtype, merge, models
from twinmerge.merging.catalogue import systems
from twinmerge.merging.method import OWN, Method, find_method
from twinmerge.tensors.sparse import uniform

Formula = Callable[[list[Tensor]], Tensor]


def method(name: str, **settings: Any) -> Method:
    return Method.model_validate({"method": name, **settings})


def family(count: int = 3) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    base, experts = models(count)
    return in_dtype(base, torch.float64), {name: in_dtype(state, torch.float64) for name, state in experts.items()}


def vectors(base: dict[str, Tensor], experts: dict[str, dict[str, Tensor]], tensor: str) -> list[Tensor]:
    return [state[tensor] - base[tensor] for state in experts.values()]


def mean(found: list[Tensor]) -> Tensor:
    return torch.stack(found).mean(0)


def matrices(formula: Formula) -> Formula:
    """The formula for matrices, the mean for everything else."""
    return lambda found: formula(found) if found[0].ndim == 2 else mean(found)


def cut(density: float, gamma: float) -> Formula:
    return lambda found: sum(reference.breadcrumbs(vector, density, gamma) for vector in found)


FORMULAS: dict[str, tuple[str, dict[str, Any], Formula]] = {
    "tsv_m": ("tsv_m", {"scaling": 0.7}, lambda found: 0.7 * matrices(reference.tsv_m)(found)),
    "iso_c": ("iso_c", {}, matrices(reference.iso_c)),
    "iso_cts": ("iso_cts", {"common_fraction": 0.3}, matrices(lambda found: reference.iso_cts(found, 0.3))),
    "iso_cts of one half": (
        "iso_cts",
        {"common_fraction": 0.5},
        matrices(lambda found: reference.iso_cts(found, 0.5)),
    ),
    "consensus": ("consensus", {"scaling": 0.3}, lambda found: 0.3 * reference.consensus(found, 0.4, 2)),
    "consensus of three": (
        "consensus",
        {"scaling": 1.0, "threshold": 0.2, "agreement": 3},
        lambda found: reference.consensus(found, 0.2, 3),
    ),
    "model_stock": ("model_stock", {}, reference.model_stock),
    "multislerp": ("multislerp", {}, lambda found: reference.multislerp(found, [1 / 3] * 3)),
    "multislerp, weights": (
        "multislerp",
        {"weight": {"e0": 0.5, "e1": 0.2, "e2": 1.0}, "normalize_weights": False},
        lambda found: reference.multislerp(found, [0.5, 0.2, 1.0]),
    ),
    "breadcrumbs": ("breadcrumbs", {"density": 0.3, "gamma": 0.1, "scaling": 1.0}, cut(0.3, 0.1)),
    "breadcrumbs, too much": ("breadcrumbs", {"density": 0.7, "gamma": 0.6, "scaling": 1.0}, cut(0.7, 0.6)),
    "breadcrumbs_ties": (
        "breadcrumbs_ties",
        {"density": 0.6, "gamma": 0.1, "normalize": True},
        lambda found: reference.elect_and_average(
            [reference.breadcrumbs(vector, 0.6, 0.1).flatten() for vector in found]
        ).view(found[0].shape),
    ),
    "sce": ("sce", {}, lambda found: reference.sce(found, 1.0)),
    "sce, selected": ("sce", {"select_topk": 0.4}, lambda found: reference.sce(found, 0.4)),
    "sce, nothing selected": ("sce", {"select_topk": 1e-6}, lambda found: torch.zeros_like(found[0])),
}


@pytest.mark.parametrize("case", FORMULAS)
@pytest.mark.parametrize("entries", [5, 1000])
def test_a_system_is_its_slow_formula(case: str, entries: int) -> None:
    name, settings, formula = FORMULAS[case]
    base, experts = family()
    merged = merge(method(name, **settings), base, experts, entries=entries)
    for tensor in base:
        expected = base[tensor] + formula(vectors(base, experts, tensor))
        assert torch.allclose(merged[tensor], expected, atol=2e-5), tensor  # task vectors are float32


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_nuslerp_is_the_arc_between_task_vectors(share: float) -> None:
    base, experts = family(2)
    merged = merge(method("nuslerp", weight={"e0": 1 - share, "e1": share}), base, experts)
    for tensor in base:
        first, second = vectors(base, experts, tensor)
        assert torch.allclose(merged[tensor], base[tensor] + reference.slerp_of(first, second, share), atol=1e-9)


def test_karcher_is_where_no_tangent_pulls() -> None:
    base, experts = family()
    merged = merge(method("karcher", max_iter=200, tol=1e-12), base, experts)
    for tensor in base:
        expected = reference.karcher([state[tensor] for state in experts.values()])
        assert torch.allclose(merged[tensor], expected, atol=1e-9)


def test_karcher_stops_after_its_steps() -> None:
    base, experts = family()
    found = merge(method("karcher", max_iter=1), base, experts)
    best = merge(method("karcher", max_iter=200, tol=1e-12), base, experts)
    assert all(0 < (found[tensor] - best[tensor]).abs().max() < 0.5 for tensor in base)


def test_karcher_of_two_is_the_middle_of_their_arc_at_the_mean_length() -> None:
    base, experts = {"w": torch.zeros(2)}, {"a": {"w": torch.tensor([3.0, 0.0])}, "b": {"w": torch.tensor([0.0, 1.0])}}
    assert merge(method("karcher"), base, experts)["w"].tolist() == pytest.approx([2**0.5, 2**0.5])


@pytest.mark.parametrize("name", ["karcher", "multislerp"])
def test_directions_that_cancel_have_a_mean_all_the_same(name: str) -> None:
    base, experts = {"w": torch.zeros(2)}, {"a": {"w": torch.tensor([2.0, 0.0])}, "b": {"w": torch.tensor([-1.0, 0.0])}}
    found = merge(method(name), base, experts)["w"].tolist()
    assert found == pytest.approx({"karcher": [1.5, 0.0], "multislerp": [0.5, 0.0]}[name])
    nothing = {expert: {"w": torch.zeros(2)} for expert in ("a", "b")}
    assert merge(method(name), base, nothing)["w"].tolist() == [0.0, 0.0]


def test_model_stock_stays_with_the_base_where_experts_pull_apart() -> None:
    base, experts = {"w": torch.zeros(1)}, {"a": {"w": torch.tensor([1.0])}, "b": {"w": torch.tensor([-1.0])}}
    assert merge(method("model_stock"), base, experts)["w"].tolist() == [0.0]


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_della_keeps_what_its_draw_and_the_ranks_say(density: float) -> None:
    base, experts = family()
    linear = merge(method("della_linear", density=density, scaling=1.0, seed=3), base, experts)
    mean_of = merge(method("della_linear", density=density, scaling=1.0, seed=3, normalize=True), base, experts)
    elected = merge(method("della", density=density, seed=3), base, experts)
    for tensor in base:
        kept = [vector.float() for vector in vectors(base, experts, tensor)]
        if density < 1:
            draws = [uniform(base[tensor].numel(), 3, name, tensor) for name in experts]
            kept = [reference.magprune(v, d, density, 0.15) for v, d in zip(kept, draws, strict=True)]
        assert torch.allclose(linear[tensor], base[tensor] + sum(kept), atol=1e-5)
        assert torch.allclose(mean_of[tensor], base[tensor] + sum(kept) / 3, atol=1e-5)
        of_signs = reference.elect_and_average([one.flatten() for one in kept]).view(base[tensor].shape)
        assert torch.allclose(elected[tensor], base[tensor] + of_signs, atol=1e-5)


def test_della_keeps_each_value_on_average_and_may_leave_it_as_it_is() -> None:
    base, experts = {"w": torch.zeros(1, 6)}, {"a": {"w": torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0, -6.0]])}}
    draws = [
        merge(method("della_linear", scaling=1.0, density=0.5, seed=seed), base, experts)["w"] for seed in range(1000)
    ]
    found, values = torch.stack(draws).mean(0), experts["a"]["w"]
    assert ((found - values).abs() <= 0.22 * values.abs()).all()  # five standard errors at the rarest chance
    once = merge(method("della_linear", scaling=1.0, rescale=False), base, experts)["w"]
    assert all(value in (0, own) for value, own in zip(once[0].tolist(), values[0].tolist(), strict=True))
    alone = merge(
        method("della_linear", scaling=1.0, rescale=False), {"w": torch.zeros(1)}, {"a": {"w": torch.ones(1)}}
    )
    assert alone["w"].item() in (0, 1)


def test_orthogonal_tasks_are_added_up_by_tsv_m() -> None:
    base = {"w": torch.zeros(4, 6)}
    first, second = torch.zeros(4, 6), torch.zeros(4, 6)
    first[:2, :3], second[2:, 3:] = torch.randn(2, 3), torch.randn(2, 3)
    merged = merge(method("tsv_m"), base, {"a": {"w": first}, "b": {"w": second}})["w"]
    assert torch.allclose(merged.float(), first + second, atol=1e-5)


def test_directions_that_no_task_has_are_not_made_up() -> None:
    base = {"w": torch.zeros(5, 6)}
    one = torch.outer(torch.arange(5.0), torch.arange(6.0))
    for name in ("tsv_m", "iso_c", "iso_cts"):
        merged = merge(method(name), base, {"a": {"w": one}, "b": {"w": one}})["w"]
        assert torch.linalg.matrix_rank(merged, atol=1e-4) == 1
        assert merged.norm() == pytest.approx(float(one.norm()) * (1 if name == "tsv_m" else 2), rel=1e-5)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts"])
def test_embeddings_are_averaged(name: str) -> None:
    base, experts = family()
    base = {"embed_tokens.weight": base["weight"]}
    experts = {expert: {"embed_tokens.weight": state["weight"]} for expert, state in experts.items()}
    merged = merge(method(name), base, experts)["embed_tokens.weight"]
    assert torch.allclose(merged, torch.stack([s["embed_tokens.weight"] for s in experts.values()]).mean(0), atol=1e-9)


@pytest.mark.parametrize(
    ("name", "settings", "experts", "words"),
    [
        ("nuslerp", {}, "abc", "nuslerp goes from one model to another, found 3 besides the base"),
        ("nuslerp", {"weight": {"a": 1.0, "b": -1.0}}, "ab", "must not sum to zero"),
        ("nuslerp", {"weight": {"a": 1.0}}, "ab", "weight must be one number"),
        ("multislerp", {"weight": {"a": 1.0, "b": -1.0}}, "ab", "must not sum to zero when they are normalised"),
        ("multislerp", {"weight": {"a": 1.0}}, "ab", "weight must be one number"),
        ("della", {"density": 0.1}, "ab", r"must be in \(0, 1\), found 0.1 and 0.15"),
        ("della", {"density": {"a": 0.5}}, "ab", "density must be one number"),
        ("consensus", {"threshold": {"a": 0.5}}, "ab", "threshold must be one number"),
    ],
)
def test_settings_that_do_not_fit_are_named(name: str, settings: dict[str, Any], experts: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        raise ValueError(method(name, **settings).misfit(list(experts)))


@pytest.mark.parametrize("name", ["della", "nuslerp", "multislerp", "consensus"])
def test_defaults_fit_two_experts(name: str) -> None:
    assert method(name).misfit(["a", "b"]) is None


def test_what_a_whole_matrix_takes_is_known_before() -> None:
    for name in ("tsv_m", "iso_c", "iso_cts", "della"):
        assert find_method(name).whole
        assert method(name).memory_bytes((400, 300), 3) > 8 * 400 * 300
    assert not method("tsv_m").takes_whole("model.embed_tokens.weight", (400, 300))
    assert not method("iso_c").takes_whole("layers.0.norm.weight", (400,))
    assert method("iso_c").takes_whole("embed_out.weight", (400, 300))  # GPT-NeoX's output layer
    assert method("regmean").memory_bytes((30522, 384), 8) == 8 * 384**2 * 12  # no layer reads a vocabulary
    assert method("regmean").memory_bytes((384, 1536), 8) == 8 * 1536**2 * 12
    assert method("iso_cts").takes_whole("layers.0.q.weight", (400, 300))


def test_catalogue_names_every_method_with_its_options() -> None:
    found = {system.name: system for system in systems()}
    assert set(OWN) <= set(found)
    assert found["ties"].options == {
        key: value for key, value in method("ties").model_dump().items() if key != "method"
    }
    assert found["slerp"].uses == ("merge",)
    assert found["regmean"].data == "unlabelled inputs of each expert"
    assert {name for name, system in found.items() if system.protocol == "B"} == {"emr", "tall", "tsv_c"}
    assert {system.protocol for system in found.values()} == {"A", "B"}
    assert all(system.summary.endswith(".") for system in found.values())
