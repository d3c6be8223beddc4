"""A build proves itself: the laws that a finished twin is tried on, and that no twin is published that breaks one."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests import tiny
from tests.tiny import Family
from twinmerge.cli import main
from twinmerge.errors import CheckError
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import build
from twinmerge.twin.artifact import TwinArtifact

Get = Callable[[str], Family]
WHOLE = {"rank": 64, "embeddings": "exclusive"}


def checked(folder: Path) -> Any:
    return json.loads((folder / "twin.json").read_text())["check"]


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "roberta"])
def test_what_is_kept_whole_is_each_expert(family: Get, twin: Callable[..., Path], name: str) -> None:
    found = checked(twin(name))
    assert found["rows"] == 6
    assert max(found["forward"], found["alone"]) < 1e-4
    assert (found["cached"] is None) == (name in ("bert", "roberta"))
    for agreement in found["experts"].values():
        assert agreement["distance"] < 1e-3


def test_what_is_cut_is_as_far_off_as_compression_predicts(twin: Callable[..., Path]) -> None:
    found = checked(twin("bert", exclusive={"rank": 2, "embeddings": "exclusive"}))
    for agreement in found["experts"].values():
        assert 0 < agreement["distance"] < 10 * agreement["predicted"] < 10


def test_what_is_kept_whole_in_16_bits_is_each_expert_to_their_rounding(tmp_path: Path) -> None:
    base = tiny.bert().to(torch.bfloat16)
    narrow = tiny.make_family(tmp_path, base, transformers.BertForSequenceClassification, scale=0.05)
    build(narrow.recipe(exclusive=WHOLE), tmp_path / "twin")
    for agreement in checked(tmp_path / "twin")["experts"].values():
        assert 0 < agreement["distance"] < agreement["predicted"] < 2 * torch.finfo(torch.bfloat16).eps


def test_adapters_are_compared_too(tmp_path: Path) -> None:
    adapted, _ = tiny.adapter_family(tmp_path)
    build(adapted.recipe(exclusive=WHOLE), tmp_path / "twin")
    assert all(agreement["distance"] < 1e-3 for agreement in checked(tmp_path / "twin")["experts"].values())


def test_expert_that_loses_a_parameter_is_not_published(
    family: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = TwinArtifact.exclusive

    def without_one(artifact: TwinArtifact, expert: str) -> Mapping[str, Any]:
        return {
            name: part for name, part in kept(artifact, expert).items() if "layer.1.output.dense.weight" not in name
        }

    monkeypatch.setattr(TwinArtifact, "exclusive", without_one)
    with pytest.raises(CheckError, match="expert 'ag' is not served as it serves itself: .* off by .*--no-check"):
        build(family("bert").recipe(exclusive=WHOLE), tmp_path / "twin")
    assert not (tmp_path / "twin").exists()


def test_rows_that_see_each_other_are_not_published(
    family: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = TwinModel.forward

    def leaking(model: TwinModel, **inputs: Any) -> Any:
        out = right(model, **inputs)
        out.logits = (
            [row + 0.1 * len(out.logits) for row in out.logits] if inputs["gate"].count_nonzero() > 9 else out.logits
        )
        return out

    monkeypatch.setattr(TwinModel, "forward", leaking)
    with pytest.raises(CheckError, match="a row alone must give what it gives in a batch"):
        build(family("bert").recipe(exclusive=WHOLE), tmp_path / "twin")


def test_forward_that_is_not_the_merged_model_is_not_published(
    family: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = TwinModel.materialize
    monkeypatch.setattr(TwinModel, "materialize", lambda model, gate: right(model, gate * 0.9))
    with pytest.raises(CheckError, match="a gated forward must equal the model with merged weights"):
        build(family("bert").recipe(exclusive=WHOLE), tmp_path / "twin")


def test_generation_from_a_wrong_cache_is_not_published(
    family: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = TwinModel.generate

    def other(model: TwinModel, **inputs: Any) -> Tensor:
        written: Tensor = right(model, **inputs)
        return torch.cat([written[:, :-1], (written[:, -1:] + 7) % tiny.VOCABULARY], dim=1)

    monkeypatch.setattr(TwinModel, "generate", other)
    with pytest.raises(CheckError, match="a generation that keeps its cache must say what the merged model says"):
        build(family("llama").recipe(exclusive=WHOLE), tmp_path / "twin")


def test_a_twin_without_a_check_says_so(family: Get, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    lines = [f"base: {family('bert').base}", "experts:"]
    for name in tiny.EXPERTS:
        root = family("bert").root
        lines.append(f"  {name}: {{model: {root / name}, router_data: {root / name}.jsonl}}")
    recipe.write_text("\n".join(lines) + "\nexclusive: {rank: 2}\n")
    assert main(["build", str(recipe), "--out", str(tmp_path / "twin"), "--no-check"]) == 0
    assert "check: none was made of this twin" in capsys.readouterr().out
    assert checked(tmp_path / "twin") is None
