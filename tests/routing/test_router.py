"""Routers: features in, gates out; calibrated, repeatable, and silent about inputs they do not know."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from twinmerge.errors import DataError, GateError
from twinmerge.files.hashes import sha256_of
from twinmerge.routing import hidden as module
from twinmerge.routing.calibrate import calibration_error
from twinmerge.routing.combined import assemble
from twinmerge.routing.fit import fit_router
from twinmerge.routing.hidden import HEADS, LinearHead
from twinmerge.routing.router import Router, Routing, Stored
from twinmerge.routing.store import load_router, save_router
from twinmerge.twin.features import Layers
from twinmerge.twin.recipe import RouterSettings

METHODS = sorted(HEADS)
ALL = Layers("all")
EXPERTS = ("ag", "sms", "trec")
Features = dict[str, Tensor]


def clusters(
    rows: int = 60, distance: float = 1.5, size: int = 8, seed: int = 0, names: tuple[str, ...] = EXPERTS
) -> Features:
    """One Gaussian cloud an expert; at this distance about 1 in 50 rows lies nearer to another."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(rows, size, generator=generator)
        + distance * 2**0.5 * nn.functional.one_hot(torch.tensor(i), size)
        for i, name in enumerate(sorted(names))
    }


def fitted(rows: Features | None = None, seed: int = 0, **given: object) -> Router:
    features = rows or clusters()
    batch = Stored({ALL: torch.cat(list(features.values()))})
    owners = [name for name, rows in features.items() for _ in rows]
    return fit_router(batch, owners, RouterSettings(**{"method": "linear", "features": "all", **given}), seed=seed)


def routed(router: Router, features: Tensor) -> Routing:
    return router.route(Stored({ALL: features}))


def truth(features: Features) -> tuple[Tensor, Tensor]:
    labels = [torch.full((len(rows),), i) for i, rows in enumerate(features.values())]
    return torch.cat(list(features.values())), torch.cat(labels)


def same(first: Routing, second: Routing) -> bool:
    names = ("gate", "router_logits", "probability", "fallback")
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


# ---- routing


@pytest.mark.parametrize("method", METHODS)
def test_separable_inputs_find_their_experts(method: str) -> None:
    router = fitted(clusters(distance=5), method=method, learning_rate=0.01)
    inputs, labels = truth(clusters(distance=5, seed=9))
    assert float((routed(router, inputs).expert == labels).float().mean()) > 0.97  # chance is 1/3
    assert router.report["accuracy"] > 0.97


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_of_the_gate_sum_to_one_where_the_router_knows_the_input(method: str, dtype: torch.dtype) -> None:
    routing = routed(fitted(method=method), truth(clusters(seed=9))[0].to(dtype))
    total = routing.gate.sum(dim=1)
    assert routing.gate.shape == (180, 3)
    assert torch.allclose(total, 1.0 - routing.fallback.float())  # zeros where it does not
    assert int(routing.fallback.sum()) <= 5


@pytest.mark.parametrize("method", METHODS)
def test_input_far_from_every_expert_is_left_to_the_shared_expert(method: str) -> None:
    near = truth(clusters(seed=9))[0][:5]
    routing = routed(fitted(method=method), torch.cat([near, torch.full((1, 8), -40.0)]))
    assert routing.fallback.tolist() == [False] * 5 + [True]
    assert torch.equal(routing.gate[5], torch.zeros(3))
    assert 0 <= int(routing.expert[5]) < 3  # some head answers all the same


@pytest.mark.parametrize("method", METHODS)
def test_autocast_does_not_change_a_gate(method: str) -> None:
    features, _ = truth(clusters(rows=20))
    router = fitted(method=method)
    with torch.autocast("cpu", torch.bfloat16):
        found = routed(router, features)
    assert torch.equal(found.gate, routed(router, features).gate)


DETECTORS = [("distance", 1.0, 0.5), ("energy", 0.0, 0.9), ("both", 1.0, 0.9)]


def between(rows: int = 200, size: int = 8) -> Tensor:
    """As near to the experts' inputs as they are to each other, but no expert's: around the middle of them all."""
    middle = torch.stack([part.mean(dim=0) for part in clusters(rows=400, distance=4).values()]).mean(dim=0)
    return middle + torch.randn(rows, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("detector", "far", "middle"), DETECTORS)
def test_both_detectors_together_find_what_is_far_and_what_is_nobodys(detector: str, far: float, middle: float) -> None:
    """Far out a linear head's logits are huge, so energy calls it familiar; in the middle the distance is small."""
    router = fitted(clusters(rows=400, distance=4), detector=detector, fallback=0.95)
    own = routed(router, truth(clusters(rows=400, distance=4, seed=9))[0]).fallback.float().mean()
    assert float(own) == pytest.approx(0.05, abs=0.03)
    away = truth(clusters(rows=50, distance=40, seed=5))[0]
    assert float(routed(router, away).fallback.float().mean()) == pytest.approx(far, abs=0.05)
    found = float(routed(router, between()).fallback.float().mean())
    assert found > middle if detector != "distance" else found < middle


def test_energies_that_are_all_the_same_say_nothing() -> None:
    router = fitted({"a": torch.ones(4, 2), "b": torch.ones(4, 2)})
    assert float(router.energy[0]) == 0
    found = routed(router, torch.tensor([[1.0, 1.0], [9.0, 9.0]]))
    assert found.fallback.tolist() == [False, True]


def test_fallback_can_be_switched_off() -> None:
    routing = routed(fitted(fallback=None), torch.full((1, 8), -40.0))
    assert not routing.fallback.any()
    assert float(routing.gate.sum()) == pytest.approx(1.0)


def test_fallback_leaves_the_held_out_inputs_below_its_quantile_alone() -> None:
    for quantile, share in ((1.0, 0.0), (0.9, 0.1)):
        router = fitted(clusters(rows=500), fallback=quantile)
        found = routed(router, truth(clusters(rows=500, seed=9))[0]).fallback.float().mean()
        assert float(found) == pytest.approx(share, abs=0.05)


@given(st.integers(0, 99))
@settings(max_examples=10)
def test_a_row_does_not_depend_on_its_batch_mates(seed: int) -> None:
    inputs = truth(clusters(rows=4, seed=seed))[0]
    for method in METHODS:
        router = fitted(method=method, epochs=1)
        alone = torch.cat([routed(router, row[None]).gate for row in inputs])
        assert torch.allclose(routed(router, inputs).gate, alone, atol=1e-5)  # float32 sums of another length


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_experts_changes_no_bit_of_a_router(method: str) -> None:
    inputs = truth(clusters(seed=9))[0]
    features = clusters()
    plain = fitted(features, method=method)
    permuted = fitted({name: features[name] for name in ("trec", "ag", "sms")}, method=method)
    assert permuted.expert_names == plain.expert_names == EXPERTS
    assert torch.equal(routed(permuted, inputs).gate, routed(plain, inputs).gate)


# ---- heads


def test_centroid_head_is_the_distance_to_each_mean() -> None:
    router = fitted(method="centroid", held_out=0.01)
    inputs = truth(clusters(seed=9))[0]
    scorer = router.scorer
    standard = (inputs - scorer.mean) / scorer.deviation
    expected = torch.stack([-0.5 * (standard - centre).square().mean(dim=1) for centre in scorer.centroids], dim=1)
    assert torch.allclose(routed(router, inputs).router_logits, expected, atol=1e-5)


def test_neighbours_head_counts_votes_by_similarity() -> None:
    features = {"a": torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.0]]), "b": torch.tensor([[0.0, 1.0]] * 3)}
    router = fitted(features, method="knn", neighbours=2, held_out=0.01)
    shares = routed(router, torch.tensor([[1.0, 0.0], [0.0, 1.0]])).router_logits.exp()
    # two neighbours of similarity 1 and half a vote for each expert: 2.5 of 3
    assert torch.allclose(shares, torch.tensor([[2.5, 0.5], [0.5, 2.5]]) / 3, atol=1e-2)


def test_more_neighbours_than_inputs_asks_all_of_them() -> None:
    router = fitted(clusters(rows=5), method="knn", neighbours=100)
    assert int(router.scorer.head.neighbours) == 12


def test_linear_head_learns_from_held_out_inputs_once_they_have_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[tuple[int, float]] = []
    regression = module._logistic_regression

    def watched(rows: module.Rows, strength: float, *start: Tensor) -> tuple[Tensor, Tensor]:
        fits.append((len(rows.labels), strength))
        return regression(rows, strength, *start)

    monkeypatch.setattr(module, "_logistic_regression", watched)
    router = fitted(held_out=0.2)
    rows = 60 * len(EXPERTS)
    assert [count for count, _ in fits] == [rows * 4 // 5] * 4 + [rows]
    assert isinstance(router.scorer.head, LinearHead)
    assert fits[-1][1] == router.scorer.head.strength
    assert router.report["held_out"] == rows // 5


def test_what_the_settings_look_at_must_be_given() -> None:
    with pytest.raises(GateError, match="looks at tokens needs token ids"):
        fitted(features="all+tokens")
    with pytest.raises(GateError, match="looks at hidden states needs those of layer:3"):
        fitted(features="layer:3")


def test_mlp_takes_the_epoch_with_the_lowest_held_out_loss() -> None:
    features = clusters()
    losses = [held_out_loss(fitted(features, method="mlp", epochs=n, learning_rate=0.05)) for n in (1, 2, 12)]
    assert losses == sorted(losses, reverse=True)


def test_mlp_leaves_out_a_batch_of_one_row_which_batch_norm_cannot_take() -> None:
    names = ("a", "b", "c", "d", "e")
    router = fitted(clusters(rows=16, names=names), method="mlp", epochs=1)  # 5 x 13 = 64 + 1 rows
    assert router.report["inputs_per_expert"] - router.report["held_out"] // 5 == 13


def held_out_loss(router: Router) -> float:
    """Cross-entropy on rows the router has not seen, at temperature 1."""
    features = clusters()
    count = len(features["ag"])
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: round(0.2 * count)]
    inputs, labels = truth({name: values[rows] for name, values in features.items()})
    return float(nn.functional.cross_entropy(routed(router, inputs).router_logits, labels))


# ---- the form of the gate


def test_gate_is_soft_top_k_or_hard() -> None:
    inputs = truth(clusters(seed=9, distance=0.5))[0]
    soft, two, hard = (
        routed(fitted(clusters(distance=0.5), gate=gate, fallback=None), inputs) for gate in ("soft", "top_k", "hard")
    )
    assert torch.equal(soft.gate, soft.probability)
    assert torch.equal(hard.gate, nn.functional.one_hot(soft.expert, 3).float())
    least = soft.gate.argmin(dim=1, keepdim=True)
    rest = soft.gate.scatter(1, least, 0)
    assert torch.allclose(two.gate, rest / rest.sum(dim=1, keepdim=True))
    assert all(torch.equal(found.probability, soft.probability) for found in (two, hard))
    every = routed(fitted(clusters(distance=0.5), gate="top_k", top_k=9, fallback=None), inputs)
    assert torch.allclose(every.gate, soft.gate)  # more than there are experts


# ---- calibration


@pytest.mark.parametrize("method", METHODS)
def test_temperature_never_raises_the_held_out_loss(method: str) -> None:
    router = fitted(method=method)
    features = clusters()
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:12]
    inputs, labels = truth({name: values[rows] for name, values in features.items()})
    logits = routed(router, inputs).router_logits
    losses = [float(nn.functional.cross_entropy(logits / t, labels)) for t in (1.0, router.report["temperature"])]
    assert losses[1] <= losses[0] + 1e-6  # float32
    assert router.report["held_out"] == len(labels)


def test_too_confident_head_gets_a_temperature_above_one() -> None:
    features = clusters(rows=40, distance=0.3)
    assert fitted(features, method="knn", neighbours=1).report["temperature"] > 1.5


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
@settings(max_examples=50)
def test_calibration_error_is_the_mean_gap_over_fifteen_bins(answers: list[tuple[float, bool]]) -> None:
    confidence = torch.tensor([c for c, _ in answers])
    correct = torch.tensor([c for _, c in answers])
    expected = 0.0
    for index in range(15):
        inside = [
            (float(c), r) for c, r in zip(confidence, correct.tolist(), strict=True) if min(int(c * 15), 14) == index
        ]
        if inside:
            gap = sum(c for c, _ in inside) / len(inside) - sum(r for _, r in inside) / len(inside)
            expected += len(inside) / len(answers) * abs(gap)
    assert calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-5)


def test_perfect_confidence_has_no_calibration_error() -> None:
    assert calibration_error(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([True, True, False])) == 0.0


# ---- the data it is fitted on


def test_all_inputs_up_to_the_bound_are_used_whatever_the_smallest_experts_number() -> None:
    features = clusters()
    features["sms"] = features["sms"][:21]
    report = fitted(features, samples_per_expert=40).report
    assert report["inputs"] == {"ag": 40, "sms": 21, "trec": 40}
    assert (report["inputs_per_expert"], report["held_out"], report["feature_size"]) == (21, 8 + 4 + 8, 8)


def test_inputs_beyond_the_bound_are_left_out_anywhere_among_them() -> None:
    """A file of rows may be sorted."""
    features = {name: torch.arange(60.0).view(-1, 1) + 100 * i for i, name in enumerate(EXPERTS)}
    stored = fitted(features, method="knn", samples_per_expert=10, held_out=0.1).scorer
    assert len(stored.head.labels) == 27
    assert float(stored.mean) == pytest.approx(130, abs=15)


@pytest.mark.parametrize("method", METHODS)
def test_expert_with_few_inputs_counts_as_much_as_the_others(method: str) -> None:
    features = clusters(rows=600, distance=0.7)
    features["sms"] = features["sms"][:40]
    router = fitted(features, method=method, epochs=40, neighbours=50)
    inputs, _ = truth(clusters(rows=400, distance=0.7, seed=9))
    share = float((routed(router, inputs).expert == 1).float().mean())
    assert share == pytest.approx(1 / 3, abs=0.1)  # unweighted: a twentieth


def test_weighted_fit_is_that_of_rows_said_more_than_once() -> None:
    x, y = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    weights = torch.where(y == 1, 3.0, 1.0)
    zero = torch.zeros(3, 4), torch.zeros(3)
    weighted = module._logistic_regression(module.Rows(x, y, weights), 0.1, *zero)
    repeated = torch.arange(30).repeat_interleave(weights.long())
    plain = module._logistic_regression(module.Rows(x[repeated], y[repeated], torch.ones(50)), 0.1, *zero)
    assert torch.allclose(weighted[0], plain[0], atol=1e-3)  # L-BFGS ends within this


@pytest.mark.parametrize("held_out", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("method", METHODS)
def test_two_inputs_of_each_expert_are_enough(method: str, held_out: float) -> None:
    router = fitted(clusters(rows=2), method=method, held_out=held_out)
    assert routed(router, truth(clusters())[0]).gate.isfinite().all()


def test_one_input_of_an_expert_is_too_few() -> None:
    features = clusters()
    features["sms"] = features["sms"][:1]
    with pytest.raises(DataError, match="the router needs at least 2 inputs of every expert, found 1 of 'sms'"):
        fitted(features)


# ---- same seed, same bits


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_gives_the_same_bits_and_leaves_the_callers_random_numbers_alone(method: str) -> None:
    inputs = truth(clusters(seed=9))[0]
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = routed(fitted(method=method, epochs=2), inputs)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert same(routed(fitted(method=method, epochs=2), inputs), first)
    assert not same(routed(fitted(method=method, epochs=2, seed=1), inputs), first)


@pytest.mark.parametrize("method", METHODS)
def test_saved_router_gives_the_same_bits(tmp_path: Path, method: str) -> None:
    router = fitted(method=method, epochs=2)
    save_router(router, tmp_path / "router")
    loaded = load_router(tmp_path / "router")
    assert same(routed(loaded, truth(clusters(seed=9))[0]), routed(router, truth(clusters(seed=9))[0]))
    assert (loaded.expert_names, loaded.settings, loaded.report) == (
        router.expert_names,
        router.settings,
        router.report,
    )
    assert not loaded.training
    save_router(loaded, tmp_path / "again")
    for name in ("router.json", "router.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "router" / name).read_bytes()


def test_router_without_fallback_survives_the_file(tmp_path: Path) -> None:
    save_router(fitted(fallback=None), tmp_path / "router")
    assert float(load_router(tmp_path / "router").fallback_distance) == float("inf")
    json.loads((tmp_path / "router" / "router.json").read_text(), parse_constant=pytest.fail)


def test_golden_bytes_of_a_router(tmp_path: Path) -> None:
    router = assemble(
        ["a", "b"], RouterSettings(method="centroid", features="all", detector="distance"), feature_size=2
    )
    router.report = {"accuracy": 1.0}
    save_router(router, tmp_path / "router")
    assert sha256_of(tmp_path / "router" / "router.safetensors").startswith("29b95ad714d66b3c")
    assert list(json.loads((tmp_path / "router" / "router.json").read_text())) == ["expert_names", "settings", "report"]
