"""Fisher and RegMean, given what was measured: the reference, and the laws of both."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.merging.memory import in_dtype, merge, models
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.writer import save_tensors
from twinmerge.merging.fisher import Fisher
from twinmerge.merging.method import Calibrated, Chunk
from twinmerge.merging.regmean import BY_COLUMN, BY_ROW, RegMean
from twinmerge.merging.statistics import Statistics

Measured = dict[str, dict[str, Tensor]]
Store = Callable[[Measured], Statistics]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    def write(measured: Measured) -> Statistics:
        for expert, tensors in measured.items():
            save_tensors({"": torch.zeros(1), **tensors}, tmp_path / f"{expert}.safetensors")
        return Statistics(data={expert: Checkpoint.open(tmp_path / f"{expert}.safetensors") for expert in measured})

    return write


def information(count: int) -> Measured:
    """Some below the floor, none for the bias."""
    _, experts = models(count, seed=5)
    return {
        e: {name: (t.square() - 1e-2).clamp_min(0) for name, t in s.items() if name != "bias"}
        for e, s in experts.items()
    }


def inputs(count: int, rows: int = 30) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {f"e{i}": torch.randn(rows, 6, generator=generator, dtype=torch.float64) for i in range(count)}


def grams(read: dict[str, Tensor], ending: str = BY_COLUMN) -> Measured:
    return {expert: {f"weight{ending}": (x.T @ x).float()} for expert, x in read.items()}


# ---- Fisher


@pytest.mark.parametrize("entries", [5, 1000])
def test_fisher_is_that_of_the_reference(store: Store, entries: int) -> None:
    base, experts = models(3)
    measured, weight = information(3), {"e0": 1.0, "e1": 0.5, "e2": 0.0}
    merged = merge(Fisher(weight=weight), base, experts, entries=entries, statistics=store(measured))
    for name in base:
        found = [measured[e].get(name, torch.zeros_like(base[name])).double() for e in experts]
        expected = reference.fisher([experts[e][name].double() for e in experts], found, list(weight.values()), 1e-6)
        assert torch.allclose(merged[name], expected, atol=1e-12)


def test_what_no_answer_hangs_on_is_averaged(store: Store) -> None:
    base, experts = models(2)
    merged = merge(Fisher(), base, experts, statistics=store({"e0": {}, "e1": {}}))
    assert all(torch.allclose(merged[n].float(), (experts["e0"][n] + experts["e1"][n]) / 2, atol=1e-7) for n in base)


# ---- RegMean


@pytest.mark.parametrize("ending", [BY_COLUMN, BY_ROW])
@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_regmean_is_that_of_the_reference_whichever_axis_takes_the_inputs(
    store: Store, ending: str, alpha: float
) -> None:
    base, experts = models(3)
    if ending == BY_ROW:
        experts = {e: s | {"weight": s["weight"].T.contiguous()} for e, s in experts.items()}
        base = base | {"weight": base["weight"].T.contiguous()}
    read = inputs(3)
    merged = merge(RegMean(alpha=alpha), base, experts, statistics=store(grams(read, ending)))
    turned = [s["weight"].double() if ending == BY_ROW else s["weight"].double().T for s in experts.values()]
    expected = reference.regmean(turned, list(read.values()), alpha)
    assert torch.allclose(merged["weight"], expected if ending == BY_ROW else expected.T, atol=1e-5)  # the ridge
    for name in ("bias", "conv"):
        assert torch.allclose(merged[name].float(), torch.stack([s[name] for s in experts.values()]).mean(0), atol=1e-7)


def test_regmean_with_alpha_one_is_least_squares_over_all_outputs(store: Store) -> None:
    base, experts = models(2)
    read = inputs(2)
    merged = merge(RegMean(alpha=1.0), base, experts, statistics=store(grams(read)))["weight"]
    wanted = torch.cat([read[e] @ experts[e]["weight"].double().T for e in experts])
    best = torch.linalg.lstsq(torch.cat(list(read.values())), wanted).solution
    assert torch.allclose(merged, best.T, atol=1e-5)  # the ridge


def test_regmean_with_alpha_zero_and_inputs_alike_is_the_mean(store: Store) -> None:
    base, experts = models(3)
    same = {e: torch.eye(6, dtype=torch.float64) for e in experts}
    merged = merge(RegMean(alpha=0.0), base, experts, statistics=store(grams(same)))["weight"]
    assert torch.allclose(merged.float(), torch.stack([s["weight"] for s in experts.values()]).mean(0), atol=1e-6)


def test_directions_that_no_input_excites_are_averaged(store: Store) -> None:
    base, experts = models(2)
    read = inputs(2)
    for x in read.values():
        x[:, 2] = 0
    for measured in (grams(read), grams({e: torch.zeros(1, 6, dtype=torch.float64) for e in read})):
        merged = merge(RegMean(), base, experts, statistics=store(measured))["weight"]
        mean = (experts["e0"]["weight"] + experts["e1"]["weight"]) / 2
        assert torch.allclose(merged[:, 2].float(), mean[:, 2], atol=1e-6)


def test_inputs_measured_of_some_experts_only_are_refused(store: Store) -> None:
    base, experts = models(2)
    measured = grams(inputs(2)) | {"e1": {}}
    with pytest.raises(ValueError, match=r"'weight': inputs were measured of some experts only, \['e0'\]"):
        merge(RegMean(), base, experts, statistics=store(measured))


# ---- laws of both


def everything(count: int) -> Measured:
    return {e: information(count)[e] | grams(inputs(count))[e] for e in information(count)}


@pytest.mark.parametrize("method", [Fisher(), RegMean()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_expert_and_equal_experts_are_that_expert_and_keep_their_bits(
    store: Store, method: Calibrated, dtype: torch.dtype
) -> None:
    base, experts = models(1)
    base, expert = in_dtype(base, dtype), in_dtype(experts["e0"], dtype)
    given = {name: tensor.clone() for name, tensor in expert.items()}
    for names in (["e0"], ["e0", "e1", "e2"]):
        merged = merge(method, base, dict.fromkeys(names, expert), statistics=store(everything(3)))
        assert all(torch.allclose(merged[name], expert[name].double(), atol=1e-9) for name in base)
    assert all(torch.equal(expert[name], given[name]) for name in base)


@pytest.mark.parametrize("method", [Fisher(), RegMean()])
def test_order_of_experts_changes_no_bit_and_adapters_are_merged_alike(store: Store, method: Calibrated) -> None:
    base, experts = models(3)
    statistics = store(everything(3))
    merged = merge(method, base, experts, statistics=statistics)
    backward = merge(method, base, dict(reversed(experts.items())), statistics=statistics)
    assert all(torch.equal(merged[name], backward[name]) for name in base)
    zero = torch.zeros(4, 6)
    whole = method.merge(Chunk("weight", 0, zero, {e: s["weight"] for e, s in experts.items()}), statistics)
    changes = method.merge(Chunk("weight", 0, zero, {}, {e: s["weight"] for e, s in experts.items()}), statistics)
    assert torch.equal(whole, changes)


@pytest.mark.parametrize("method", [Fisher(), RegMean()])
def test_an_expert_that_was_not_measured_is_refused(method: Calibrated) -> None:
    with pytest.raises(ValueError, match="nothing was measured of expert 'e0', which its merge method needs"):
        merge(method, *models(2), statistics=Statistics())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight": {"a": -1.0, "b": 1.0}}, "weight must be at least 0, and above it for one expert, found -1"),
        ({"weight": 0.0}, "weight must be at least 0"),
        ({"weight": {"a": 1.0}}, "weight must be one number"),
        ({"calibration_data": {"a": "x"}}, r"calibration_data must name a file for every expert \(a, b\) .*see 'b'"),
        ({"calibration_data": {"a": "x", "b": "x", "c": "x"}}, "see 'c'"),
        ({"calibration_data": {"a": "x", "b": "x"}}, ""),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, object], words: str) -> None:
    fault = Fisher.model_validate(settings).misfit(["a", "b"])
    assert bool(fault) == bool(words)
    assert re.search(words, fault or "")
