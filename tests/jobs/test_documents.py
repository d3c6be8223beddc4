"""Recipes of several documents, and models with an adapter added, give what the same merges give one by one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from twinmerge.cli import main
from twinmerge.errors import RecipeError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.jobs import documents
from twinmerge.jobs.documents import merge_file
from twinmerge.jobs.merge import merge_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, two fine-tunes, and an adapter of it."""
    root = tmp_path_factory.mktemp("models")
    family = tiny.make_family(root, tiny.llama(), type(tiny.llama()), experts=("sms", "ag"))
    merged = tiny.make_adapter(root, "lora", tiny.llama(), r=2, target_modules=["q_proj", "down_proj"])
    merged.save_pretrained(root / "merged")
    assert family.base.is_dir()
    return root


def write(root: Path, name: str, *parts: str) -> Path:
    path = root / name
    path.write_text("\n---\n".join(parts))
    return path


FIRST = (
    "name: first\nmerge_method: linear\n"
    "models: [{model: sms, parameters: {weight: 1}}, {model: ag, parameters: {weight: 3}}]"
)
SECOND = (
    "name: second\nmerge_method: task_arithmetic\nbase_model: base\nmodels: [{model: sms, parameters: {weight: 0.5}}]"
)
LAST = (
    "merge_method: slerp\nbase_model: first\nmodels: [{model: first}, {model: second}]\nparameters: {t: 0.3}\n"
    "tokenizer_source: first"
)


def same(one: Path, other: Path) -> bool:
    first, second = Checkpoint.open(one), Checkpoint.open(other)
    return all(torch.equal(first.read(name), second.read(name)) for name in first.specs | second.specs)


def test_documents_are_merged_in_the_order_that_they_need(models: Path, tmp_path: Path) -> None:
    manifest = merge_file(write(models, "all.yaml", LAST, SECOND, FIRST), tmp_path / "out")
    for name, text in (("first", FIRST), ("second", SECOND)):
        merge_models(write(models, f"{name}.yaml", text), models / name)
    merge_models(write(models, "last.yaml", LAST), tmp_path / "expected")
    assert same(tmp_path / "out", tmp_path / "expected")
    assert manifest["recipe"]["experts"] == {"second": "second"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]


def test_finished_steps_are_kept_for_resume(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, made = write(models, "steps.yaml", FIRST, SECOND, LAST), list[str]()
    real = documents.merge_models

    def counted(recipe: Any, out: Path, **options: Any) -> Any:
        made.append(out.name)
        if made.count("1") == 1 and out.name == "1":
            raise RecipeError("stopped")
        return real(recipe, out, **options)

    monkeypatch.setattr(documents, "merge_models", counted)
    with pytest.raises(RecipeError, match="stopped"):
        merge_file(path, tmp_path / "out")
    assert (tmp_path / "out.steps" / "0.json").is_file()
    merge_file(path, tmp_path / "out", resume=True)
    assert made == ["0", "1", "1", "out"]
    merge_file(path, tmp_path / "out", overwrite=True)
    assert made[4:] == ["0", "1", "out"]


def test_every_document_is_read_before_the_first_is_merged(models: Path, tmp_path: Path) -> None:
    bad = LAST.replace("t: 0.3", "t: [a]")
    with pytest.raises(RecipeError, match=r"changed.yaml:13: parameters.t: must be in \[0, 1\], found 'a'"):
        merge_file(write(models, "changed.yaml", FIRST, SECOND, bad), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((FIRST, FIRST, LAST), "2 documents are named 'first'; give each a name of its own"),
        ((FIRST, LAST, LAST), "holds 3 documents, of which all but the last result need a name, found 1 with one"),
        ((FIRST, SECOND, "base: a\nexperts: {a: b}"), r"document 3 must have merge_method"),
        ((FIRST, SECOND, LAST.replace("second", "ag")), "nothing is made of the document 'second'; take it out"),
        (
            (FIRST.replace("model: sms", "model: second"), SECOND.replace("model: sms", "model: first"), LAST),
            "its documents are made of each other in a circle",
        ),
        ((FIRST, SECOND.replace("model: sms", "model: none"), LAST), "models.0.model: no file or folder"),
    ],
)
def test_documents_that_make_no_whole_are_refused(
    models: Path, tmp_path: Path, parts: tuple[str, ...], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        merge_file(write(models, "odd.yaml", *parts), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_model_with_an_adapter_is_that_of_peft(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: MODEL, parameters: {weight: 0.7}}]"
    for name, model in (("plus", "base+lora"), ("plain", "merged")):
        path = write(models, f"{name}.yaml", text.replace("MODEL", model))
        assert main(["merge", str(path), "--out", str(tmp_path / name)]) == 0
    first, second = Checkpoint.open(tmp_path / "plus"), Checkpoint.open(tmp_path / "plain")
    for name in second.specs:
        torch.testing.assert_close(first.read(name), second.read(name))
    assert not torch.equal(first.read(QUERY), Checkpoint.open(models / "base").read(QUERY))
    recorded = json.loads((tmp_path / "plus" / "merge.json").read_text())
    assert recorded["recipe"]["experts"] == {"base+lora": "base+lora"}
    assert main(["plan", str(models / "plus.yaml")]) == 0
    assert "base+lora" in capsys.readouterr().out


QUERY = "model.layers.0.self_attn.q_proj.weight"


def test_plan_takes_one_document(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(write(models, "two.yaml", FIRST, LAST))]) == 2
    assert "holds 2 documents, and this takes one; `twinmerge merge` makes them" in capsys.readouterr().err
