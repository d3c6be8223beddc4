"""A twin without a router: no inputs are needed to build it, and every call says who answers."""

from pathlib import Path

import pytest
import torch
import transformers

from tests import tiny
from tests.tiny import EXPERTS, GATE_ORDER, Family
from twinmerge.cli import main
from twinmerge.errors import GateError, RecipeError
from twinmerge.hf.model import TwinModel
from twinmerge.jobs import grow
from twinmerge.jobs.build import build
from twinmerge.jobs.predict import predict
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.twin.recipe import Recipe

RECIPE = "base: base\nexperts:\n" + "".join(f"  {name}: {{model: {name}}}\n" for name in EXPERTS)
WHOLE = "exclusive: {rank: 64, embeddings: exclusive}\n"


@pytest.fixture(scope="module", params=["bert", "gpt2", "llama"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path]:
    """A family without any rows, and its twin, built by the program."""
    root = tmp_path_factory.mktemp(request.param)
    make, cls = tiny.BASES[request.param]
    family = tiny.make_family(root, make(), getattr(transformers, cls))
    for name in EXPERTS:
        (root / f"{name}.jsonl").unlink()
    (root / "recipe.yaml").write_text(RECIPE + WHOLE + "router: none\n")
    assert main(["build", str(root / "recipe.yaml"), "--out", str(root / "twin")]) == 0
    return family, root / "twin"


def test_it_is_built_checked_and_shown(made: tuple[Family, Path], capsys: pytest.CaptureFixture[str]) -> None:
    manifest = TwinArtifact.open(made[1]).manifest
    assert manifest.router is None
    assert manifest.check is not None
    assert set(manifest.check.experts) == set(EXPERTS)
    assert main(["inspect", str(made[1])]) == 0
    assert "router: none" in capsys.readouterr().out
    assert "No router" in (made[1] / "README.md").read_text()
    assert main(["verify", str(made[1])]) == 0


def test_it_answers_whoever_is_named(made: tuple[Family, Path]) -> None:
    model = TwinModel.from_pretrained(made[1])
    with pytest.raises(GateError, match=r"no router; name an expert \(--expert\) or give a gate"):
        list(predict(model, [{"text": "w5"}]))
    alone = next(predict(model, [{"text": "w5 w9"}], expert="sms", max_new_tokens=3))
    by_gate = next(predict(model, [{"text": "w5 w9"}], gate={"sms": 1.0}, max_new_tokens=3))
    assert alone == by_gate
    assert alone["expert"] == "sms"
    mixed = next(predict(model, [{"text": "w5 w9"}], gate={"ag": 0.5, "trec": 0.6}, max_new_tokens=3))
    assert mixed["expert"] == "trec"
    assert mixed["gate"] == pytest.approx({"ag": 0.5, "sms": 0.0, "trec": 0.6})


def test_program_takes_a_gate(made: tuple[Family, Path], capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = made[0].root / "rows.jsonl", made[0].root / "out.jsonl"
    rows.write_text('{"text": "w5 w9"}\n')
    command = ["predict", str(made[1]), "--input", str(rows), "--output", str(out), "--max-new-tokens", "3"]
    assert main(command) == 2
    assert "this twin has no router" in capsys.readouterr().err
    assert main([*command, "--gate", "sms=0.7,nobody=0.3"]) == 2
    assert "unknown expert 'nobody'" in capsys.readouterr().err
    assert main([*command, "--gate", "sms=0.7,trec=0.3", "--overwrite"]) == 0
    assert "sms 1" in capsys.readouterr().out


def test_experts_come_and_go_without_inputs(made: tuple[Family, Path]) -> None:
    less = grow.remove(made[1], "trec", out=made[0].root / "less")
    assert less.expert_names == ("ag", "sms")
    more = grow.add(less.path, "trec", model=made[0].root / "trec", out=made[0].root / "more")
    assert more.expert_names == GATE_ORDER
    assert more.manifest.router is None
    first, second = TwinModel.from_pretrained(made[1]), TwinModel.from_pretrained(more.path)
    ids = torch.tensor([[5, 6, 7]])
    given = {"decoder_input_ids": ids} if first.backbone.config.is_encoder_decoder else {}
    ours, theirs = (model(input_ids=ids, expert="trec", **given).logits[0] for model in (first, second))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_what_needs_inputs_is_refused_without_them(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(RecipeError, match=r"experts.trec.router_data is missing: .* or say router: none"):
        Recipe.load(tmp_path / "recipe.yaml")
    family = tiny.make_family(tmp_path, tiny.bert(), transformers.BertForSequenceClassification)
    experts = {name: {"model": name} for name in EXPERTS}
    weighed = family.recipe(experts=experts, router=None, exclusive={"rank": 2, "weighting": "inputs"})
    with pytest.raises(RecipeError, match="is measured on inputs of every expert, and experts.trec.router_data is"):
        build(weighed, tmp_path / "twin")
    fisher = family.recipe(experts=experts, router=None, shared={"method": "fisher"}, exclusive={"rank": 2})
    with pytest.raises(RecipeError, match="router_data is missing, and fisher measures on it"):
        build(fisher, tmp_path / "twin")


def test_twin_with_a_router_takes_no_expert_without_inputs(tmp_path: Path) -> None:
    family = tiny.make_family(tmp_path, tiny.bert(), transformers.BertForSequenceClassification)
    twin = build(family.recipe(exclusive={"rank": 2}), tmp_path / "twin").path
    with pytest.raises(RecipeError, match="experts.new.router_data is missing: the router learns"):
        grow.add(twin, "new", model=tmp_path / "sms")
