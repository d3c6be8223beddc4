"""Choosing a scaling on validation rows: the best one wins, and is written into a recipe that merges with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests import tiny
from twinmerge.cli import main
from twinmerge.errors import InputError
from twinmerge.jobs.tune import choose_scaling, tune
from twinmerge.merging.method import Method
from twinmerge.merging.recipe import load_merge
from twinmerge.twin.recipe import Recipe

STATIC = "# mine\nbase: base\nexperts: {ag: ag, sms: sms}\nshared: {method: tsv_m}\n"
TWIN = """
base: base
experts: {ag: {model: ag, router_data: ag.jsonl}, sms: {model: sms, router_data: sms.jsonl}}
shared: {method: task_arithmetic, weight: 1.0}
exclusive: {rank: 2}
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tiny.Family:
    """Two experts; the labels are what the base answers under each head."""
    found = tiny.make_family(
        tmp_path_factory.mktemp("family"),
        tiny.bert(),
        tiny.transformers.BertForSequenceClassification,
        experts=("ag", "sms"),
        scale=0.3,
    )
    (found.root / "static.yaml").write_text(STATIC)
    (found.root / "twin.yaml").write_text(TWIN)
    for name in found.experts:
        rows = tiny.text_rows(name, 12)
        labels = answers(found, name, rows)
        labelled = [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]
        (found.root / f"{name}.validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    return found


def answers(family: tiny.Family, name: str, rows: list[dict[str, str]]) -> list[str]:
    """Of the base's backbone under an expert's head."""
    model: Any = tiny.transformers.BertForSequenceClassification.from_pretrained(family.root / name)
    base: Any = tiny.transformers.BertModel.from_pretrained(family.base)
    model.bert.load_state_dict(base.state_dict())
    tokens = tiny.transformers.AutoTokenizer.from_pretrained(family.base)
    with torch.inference_mode():
        found = model.eval()(**tokens([row["text"] for row in rows], padding=True, return_tensors="pt"))
    return [model.config.id2label[i] for i in found.logits.argmax(dim=1).tolist()]


def rows_of(family: tiny.Family) -> dict[str, Path]:
    return {name: family.root / f"{name}.validation.jsonl" for name in family.experts}


@pytest.mark.parametrize("recipe", ["static.yaml", "twin.yaml"])
def test_the_scaling_whose_model_answers_right_is_written(family: tiny.Family, recipe: str) -> None:
    """Labels are the base's answers, so that no scaling is better than none."""
    out = family.root / f"tuned.{recipe}"
    tuned = tune(family.root / recipe, rows_of(family), out, scalings=[3.0, 0.0])
    assert tuned.scaling == 0.0
    assert tuned.scores[0.0] == 1.0 > tuned.scores[3.0]
    before = yaml.safe_load((family.root / recipe).read_text())
    assert yaml.safe_load(out.read_text()) == {**before, "shared": {**before["shared"], "scaling": 0.0}}
    assert "accuracy by scaling: 3: 0." in out.read_text()
    loaded = load_merge(out).methods.at("w", 0.0) if recipe == "static.yaml" else Recipe.load(out).shared
    assert loaded.model_dump()["scaling"] == 0.0


def test_tune_prints_every_score(family: tiny.Family, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{name}={file}" for name, file in rows_of(family).items()]
    out = str(family.root / "printed.yaml")
    words = ["tune", str(family.root / "static.yaml"), "--rows", *rows, "--scalings", "0", "--out", out]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{out}: tsv_m with scaling 0; accuracy on validation: 0 100.00%\n"
    assert main(words) == 2
    assert f"{out} exists; choose another name, or --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"recipe": out, "scaling": 0.0, "accuracy": [[0.0, 1.0]]}
    with pytest.raises(SystemExit):
        main([*words, "--scalings", "nan"])
    assert "must be a finite number, found 'nan'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "rows", "out", "words"),
    [
        (STATIC, {"ag": "ag.validation.jsonl"}, "x.yaml", r"--rows must name a file for every expert \(ag, sms\)"),
        (STATIC, {}, "sub/x.yaml", "--out must lie beside"),
        (STATIC.replace(", sms: sms", ""), {}, "x.yaml", "experts must be two or more, found 1"),
        (STATIC.replace("tsv_m", "average"), None, "x.yaml", "shared.method 'average' has no scaling to choose"),
        (STATIC, {"ag": "ag.jsonl", "sms": "ag.jsonl"}, "x.yaml", "label"),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    family: tiny.Family, text: str, rows: dict[str, str] | None, out: str, words: str
) -> None:
    path = family.root / "wrong.yaml"
    path.write_text(text)
    given = rows_of(family) if rows is None else {name: family.root / file for name, file in rows.items()}
    with pytest.raises(InputError, match=words):
        tune(path, given, family.root / out, scalings=[0.5])
    assert not (family.root / "x.yaml").exists()


def test_models_without_labels_are_refused(tmp_path: Path) -> None:
    found = tiny.make_family(tmp_path, tiny.llama(), tiny.transformers.LlamaForCausalLM, experts=("ag", "sms"))
    (tmp_path / "static.yaml").write_text(STATIC)
    for name in found.experts:
        (tmp_path / f"{name}.validation.jsonl").write_text('{"text": "w5 w6", "label": "x"}\n')
    with pytest.raises(InputError, match="expert 'ag' must be a classifier with a head of its own"):
        tune(tmp_path / "static.yaml", rows_of(found), tmp_path / "x.yaml", scalings=[0.5])


def test_of_equal_scalings_the_first_wins() -> None:
    method = Method.model_validate({"method": "iso_c"})
    tuned = choose_scaling(method, [0.3, 0.2, 0.1], lambda scaled: min(scaled.model_dump()["scaling"], 0.2))
    assert tuned.scaling == 0.3
    assert tuned.method.model_dump()["scaling"] == 0.3
