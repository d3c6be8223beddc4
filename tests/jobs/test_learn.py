"""AdaMerging's coefficients: their gradient, their steps beside a slow loop, resumed and through merge and build."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch import Tensor
from torch.func import functional_call

from tests import tiny
from tests.tiny import EXPERTS, Family
from twinmerge.cli import main
from twinmerge.errors import MismatchError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.hf import entropy
from twinmerge.hf.entropy import Mixture
from twinmerge.hf.inputs import tokenize
from twinmerge.jobs.build import build
from twinmerge.jobs.learn import LOG, Learning
from twinmerge.jobs.measure import for_twin
from twinmerge.jobs.merge import merge_models
from twinmerge.jobs.preflight import checked
from twinmerge.merging.adamerging import AdaMerging
from twinmerge.twin.artifact import TwinArtifact

Get = Callable[[str], Family]
SHARED: dict[str, Any] = {"method": "adamerging", "steps": 4, "batch": 3, "learning_rate": 0.05}


def learning(family: Get, **settings: Any) -> Learning:
    found = for_twin(checked(family("bert").plan(shared={**SHARED, **settings}, exclusive={"rank": 1})))
    assert isinstance(found, Learning)
    return found


def mixture(found: Learning) -> Mixture:
    return Mixture([found.load(name) for name in sorted(found.rows)], found.base, found.method)


def batches(found: Learning, mixed: Mixture, size: int = 3) -> dict[str, list[dict[str, Tensor]]]:
    return {n: [tokenize(mixed.subjects[n].model, rows[:size])] for n, rows in found.rows.items()}


@pytest.mark.parametrize("granularity", ["task", "layer"])
@pytest.mark.parametrize("trimmed", [False, True])
def test_gradient_is_that_of_finite_differences(family: Get, granularity: str, trimmed: bool) -> None:
    found = learning(family, granularity=granularity, trimmed=trimmed)
    mixed = mixture(found)
    inputs = batches(found, mixed)
    mixed.gradients(inputs)
    gradient = mixed.coefficients.grad
    assert gradient is not None
    places = [(0, 0), (1, 0)] if granularity == "task" else [(0, int(gradient[0].abs().argmax())), (2, 5)]
    for place in places:
        sides = []
        for shift in (0.02, -0.02):
            with torch.no_grad():
                mixed.coefficients[place] += shift
            mixed.mix()
            sides.append(sum(float(mixed.entropy(n, one).detach()) for n, own in inputs.items() for one in own))
            with torch.no_grad():
                mixed.coefficients[place] -= shift
        assert float(gradient[place]) == pytest.approx((sides[0] - sides[1]) / 0.04, rel=0.05, abs=2e-4)


def test_steps_are_those_of_a_plain_loop_through_functional_call(family: Get) -> None:
    """Against autograd through the sum itself, model by model, and torch's Adam."""
    made = family("bert")
    found = learning(family)
    mixed, slow = mixture(found), {}
    base = Checkpoint.open(made.base)
    for name in sorted(EXPERTS):
        slow[name] = transformers.BertForSequenceClassification.from_pretrained(made.root / name).eval()
    trained = mixed.names
    vectors = {
        n: {p: dict(m.named_parameters())[f"bert.{p}"].detach() - base.read(p) for p in trained}
        for n, m in slow.items()
    }
    shares = torch.full((3, len(trained)), 0.3, requires_grad=True)
    adam = torch.optim.Adam([shares], lr=0.05, betas=(0.9, 0.999))
    for _ in range(3):
        inputs = batches(found, mixed)
        total: Any = 0.0
        for name, own in inputs.items():
            values = {
                f"bert.{p}": base.read(p) + sum(shares[row, i] * vectors[n][p] for row, n in enumerate(sorted(slow)))
                for i, p in enumerate(trained)
            }
            for one in own:
                logits = functional_call(slow[name], values, kwargs=one).logits
                chance = logits.softmax(-1)
                total = total - (chance * chance.log()).sum(-1).mean()
        adam.zero_grad()
        total.backward()
        adam.step()
        with torch.no_grad():
            shares.clamp_(0, 1)
        assert mixed.step(inputs) == pytest.approx(float(total.detach()), rel=1e-4)
    assert torch.allclose(mixed.coefficients, shares, atol=1e-3)


def test_padding_and_order_of_rows_change_nothing(family: Get) -> None:
    found = learning(family)
    mixed = mixture(found)
    mixed.mix()
    rows = list(found.rows["sms"][:4])
    model = mixed.subjects["sms"].model
    together = float(mixed.entropy("sms", tokenize(model, rows)).detach())
    alone = [float(mixed.entropy("sms", tokenize(model, [row])).detach()) for row in reversed(rows)]
    assert together == pytest.approx(sum(alone) / 4, rel=1e-4)


def test_one_coefficient_of_one_is_that_expert(family: Get, tmp_path: Path) -> None:
    made = family("bert")
    build(made.recipe(shared={**SHARED, "steps": 0, "start": 1.0}, exclusive={"rank": 1}), tmp_path / "twin")
    base, shared = Checkpoint.open(made.base), TwinArtifact.open(tmp_path / "twin").shared
    name = "encoder.layer.0.output.dense.weight"
    experts = [Checkpoint.open(made.root / n).read(f"bert.{name}") for n in EXPERTS]
    expected = base.read(name) + sum(expert - base.read(name) for expert in experts)
    assert torch.allclose(shared.read(name), expected, atol=1e-5)


def test_a_twin_stands_on_what_was_learned_and_entropy_falls(family: Get, tmp_path: Path) -> None:
    made = family("bert")
    settings = {**SHARED, "steps": 12, "learning_rate": 0.2, "batch": 24}
    twin = build(made.recipe(shared=settings, exclusive={"rank": 1}), tmp_path / "twin")
    log = json.loads((twin.path / LOG).read_text())
    assert len(log["entropies"]) == 12
    assert log["entropies"][-1] < log["entropies"][0]
    name = "encoder.layer.0.output.dense.weight"
    base = Checkpoint.open(made.base).read(name)
    change = sum(
        log["coefficients"][n][name] * (Checkpoint.open(made.root / n).read(f"bert.{name}") - base) for n in EXPERTS
    )
    assert torch.allclose(twin.shared.read(name), base + change, atol=1e-5)
    assert all(0 <= share <= 1 for own in log["coefficients"].values() for share in own.values())
    assert twin.verify()


def test_adapters_learn_as_the_models_they_make(tmp_path: Path) -> None:
    made, merged = tiny.adapter_family(tmp_path)
    found = for_twin(checked(made.plan(shared=SHARED, exclusive={"rank": 1})))
    assert isinstance(found, Learning)
    mixed = mixture(found)
    with torch.no_grad():
        mixed.coefficients.zero_()
        mixed.coefficients[sorted(EXPERTS).index("trec")] = 1.0
    mixed.mix()
    inputs = tokenize(mixed.subjects["trec"].model, list(found.rows["trec"][:3]))
    with torch.no_grad():
        chance = merged["trec"](**inputs).logits.softmax(-1)
    expected = -(chance * chance.log()).sum(-1).mean()
    assert float(mixed.entropy("trec", inputs).detach()) == pytest.approx(float(expected), rel=1e-4)


def test_experts_that_are_alike_get_coefficients_that_are_alike(family: Get, tmp_path: Path) -> None:
    root = Path(shutil.copytree(family("bert").root, tmp_path / "models"))
    for name in ("ag", "trec"):
        shutil.rmtree(root / name)
        shutil.copytree(root / "sms", root / name)
        shutil.copyfile(root / "sms.jsonl", root / f"{name}.jsonl")
    found = for_twin(checked(Family(root).plan(shared=SHARED, exclusive={"rank": 1})))
    assert isinstance(found, Learning)
    mixed = mixture(found)
    inputs = batches(found, mixed)
    for _ in range(3):
        mixed.step(inputs)
    assert torch.allclose(mixed.coefficients[0], mixed.coefficients[1])
    assert torch.allclose(mixed.coefficients[0], mixed.coefficients[2])


def test_interrupted_learning_goes_on_to_the_same_coefficients(
    family: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, settings = family("bert"), {**SHARED, "steps": 5}
    monkeypatch.setattr("twinmerge.jobs.learn._EVERY", 2)
    recipe = made.recipe(shared=settings, exclusive={"rank": 1}, router={"features": "tokens"})
    whole = build(recipe, tmp_path / "calm")

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "learning coefficients" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(recipe, tmp_path / "twin", progress=stop)
    steps: list[int] = []
    real = entropy.Mixture.step
    monkeypatch.setattr(entropy.Mixture, "step", lambda self, given: steps.append(1) or real(self, given))
    twin = build(recipe, tmp_path / "twin", resume=True)
    assert len(steps) == 3  # of five: two were kept
    assert (twin.path / LOG).read_text() == (whole.path / LOG).read_text()


def test_static_merges_learn_too_and_the_plan_says_what_it_takes(
    family: Get, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.text_config(transformers.BertConfig, num_labels=2)
    base = tiny.seeded(transformers.BertForSequenceClassification, config)
    made = tiny.make_family(tmp_path / "models", base, type(base), scale=0.1)
    data = {name: str(made.root / f"{name}.jsonl") for name in EXPERTS}
    content = {
        "base": str(made.base),
        "experts": {name: str(made.root / name) for name in EXPERTS},
        "shared": {**SHARED, "granularity": "task", "calibration_data": data, "calibration_rows": 6},
    }
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(content))
    assert main(["plan", str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["measurement"] == "entropy"
    assert said["learning_memory_bytes"] > 0
    merge_models(path, tmp_path / "out")
    log = json.loads((tmp_path / "out" / LOG).read_text())["coefficients"]
    assert all(len(set(own.values())) == 1 for own in log.values())
    assert not any("classifier" in parameter for own in log.values() for parameter in own)  # each under its own head
    heads = [Checkpoint.open(made.root / n).read("classifier.weight") for n in EXPERTS]
    assert torch.allclose(
        Checkpoint.open(tmp_path / "out").read("classifier.weight"), torch.stack(heads).mean(dim=0), atol=1e-6
    )
    name = "bert.encoder.layer.0.output.dense.weight"
    start = Checkpoint.open(made.base).read(name)
    change = sum(log[n][name] * (Checkpoint.open(made.root / n).read(name) - start) for n in EXPERTS)
    assert torch.allclose(Checkpoint.open(tmp_path / "out").read(name), start + change, atol=1e-5)


def test_experts_without_one_label_among_several_are_refused(family: Get, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="'ag' answers with continuation and stop_reason; adamerging makes answers"):
        build(family("llama").recipe(shared={"method": "adamerging"}, exclusive={"rank": 1}), tmp_path / "twin")
    assert AdaMerging().steps == 500
