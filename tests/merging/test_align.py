"""Static merges of models whose names or labels differ: by name and by label, or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM

from tests.tiny import EXPERTS, Family, rewrite
from twinmerge.errors import MismatchError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.writer import save_tensors
from twinmerge.jobs.merge import merge_models
from twinmerge.merging.plan import plan_merge
from twinmerge.merging.recipe import load_merge

Get = Callable[[str], Family]
Twins = Callable[..., Path]


def recipe(folder: Path, root: Path, base: str = "base", experts: tuple[str, ...] = EXPERTS) -> Path:
    path = folder / "recipe.yaml"
    sources = {"base": str(root / base), "experts": {name: str(root / name) for name in experts}}
    path.write_text(yaml.safe_dump({**sources, "shared": {"method": "average"}}))
    return path


def read(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.specs}


def mean(states: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([state[name].double() for state in states]).mean(0).float()


# ---- names


def test_experts_with_the_prefix_of_a_head_class_merge_into_the_base_as_build_takes_them(
    family: Get, twin: Twins, tmp_path: Path
) -> None:
    root = family("bert").root
    manifest = merge_models(recipe(tmp_path, root), tmp_path / "out")
    merged, experts = read(tmp_path / "out"), [read(root / name) for name in EXPERTS]
    assert merged.keys() == read(root / "base").keys()
    assert all(torch.allclose(tensor, mean(experts, f"bert.{name}"), atol=1e-7) for name, tensor in merged.items())
    built = read(twin("bert", shared={"method": "average"}))
    assert all(torch.equal(tensor, built[name]) for name, tensor in merged.items())
    AutoModel.from_pretrained(tmp_path / "out")
    left_out = [note for note in manifest["notes"] if "not merged and left out: 'classifier.bias' and 1 more" in note]
    assert len(left_out) == 3


def test_what_a_base_has_beside_the_backbone_is_taken_as_it_is_where_no_expert_has_it(
    family: Get, tmp_path: Path
) -> None:
    root = family("roberta").root
    manifest = merge_models(recipe(tmp_path, root), tmp_path / "out")
    merged, base, experts = read(tmp_path / "out"), read(root / "base"), [read(root / name) for name in EXPERTS]
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        in_backbone = name.startswith("roberta.") and name in experts[0]
        assert torch.allclose(tensor, mean(experts, name) if in_backbone else base[name], atol=1e-7)
    AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert any(
        note.startswith("no expert has what is taken from base as it is: 'lm_head.") for note in manifest["notes"]
    )


def test_a_base_with_a_prefix_takes_experts_without_one(family: Get, tmp_path: Path) -> None:
    for name in ("base", *EXPERTS):
        (tmp_path / name).mkdir()
        tensors = read(family("bert").root / "base")
        ours = {f"bert.{key}": tensor for key, tensor in tensors.items()} | {"classifier.weight": torch.ones(2, 16)}
        save_tensors(ours if name == "base" else tensors, tmp_path / name / "model.safetensors")
    plan = plan_merge(load_merge(recipe(tmp_path, tmp_path)))
    assert plan.copied == {"classifier.weight"}
    assert "'classifier.weight'" in plan.notes[0]
    merge_models(recipe(tmp_path, tmp_path), tmp_path / "out")
    assert all(torch.equal(tensor, read(tmp_path / "base")[name]) for name, tensor in read(tmp_path / "out").items())


def test_a_tensor_beside_the_backbone_that_only_some_have_is_refused(family: Get, tmp_path: Path) -> None:
    root = family("bert").root
    for name in ("base", *EXPERTS):
        (tmp_path / name).mkdir()
        save_tensors(read(root / name), tmp_path / name / "model.safetensors")
    rewrite(tmp_path / "sms" / "model.safetensors", lambda t: {n: v for n, v in t.items() if "pooler" not in n})
    with pytest.raises(MismatchError, match="'sms' lacks 'pooler.dense.bias', which 'ag' has; give models that all"):
        plan_merge(load_merge(recipe(tmp_path, tmp_path)))
    rewrite(tmp_path / "ag" / "model.safetensors", lambda t: {n: v for n, v in t.items() if "layer.0" not in n})
    with pytest.raises(MismatchError, match="'ag' lacks 16 of .* tensors, first '.*layer.0.*'; was it fine-tuned from"):
        plan_merge(load_merge(recipe(tmp_path, tmp_path)))


# ---- labels


def classifiers(
    folder: Path, labels: dict[str, list[str] | None], more: dict[str, tuple[int, ...]] | None = None
) -> Path:
    """Models whose head answers with these labels; None: it names none. Each has its own numbers."""
    for seed, (name, own) in enumerate(labels.items()):
        generator = torch.Generator().manual_seed(0)
        shapes = {
            "bert.a.weight": (8, 6),
            "bert.b.weight": (6, 8),
            "classifier.weight": (3, 6),
            "classifier.bias": (3,),
        }
        state = {key: torch.randn(shape, generator=generator) for key, shape in (shapes | (more or {})).items()}
        generator.manual_seed(seed)
        state = {key: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for key, tensor in state.items()}
        (folder / name).mkdir()
        save_tensors(state, folder / name / "model.safetensors")
        table = {} if own is None else {"id2label": {str(i): label for i, label in enumerate(own)}}
        (folder / name / "config.json").write_text(json.dumps({"model_type": "bert", **table}))
    return recipe(folder, folder, experts=tuple(name for name in labels if name != "base"))


NUMBERED = ["LABEL_0", "LABEL_1", "LABEL_2"]


@pytest.mark.parametrize("of_base", [["x", "y", "z"], NUMBERED, None])
def test_rows_of_permuted_labels_are_merged_label_by_label(tmp_path: Path, of_base: list[str] | None) -> None:
    path = classifiers(tmp_path, {"base": of_base, "a": ["x", "y", "z"], "b": ["z", "x", "y"]})
    manifest = merge_models(path, tmp_path / "out")
    merged, a, b = (read(tmp_path / name) for name in ("out", "a", "b"))
    for name, tensor in merged.items():
        other = b[name][[1, 2, 0]] if name.startswith("classifier") else b[name]
        assert torch.allclose(tensor, mean([a, {name: other}], name), atol=1e-7)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "x", "1": "y", "2": "z"}
    assert config["label2id"] == {"x": 0, "y": 1, "z": 2}
    [note] = manifest["notes"]
    assert note.startswith("'b': the rows of its head are put in the order of ")
    assert note.endswith(": x, y, z")


def test_heads_with_other_labels_are_refused(tmp_path: Path) -> None:
    path = classifiers(tmp_path, {"base": None, "a": ["x", "y", "z"], "b": ["x", "y", "w"]})
    with pytest.raises(
        MismatchError, match=r"expert 'b' answers with other labels than 'a' \('w' is one\); .*twinmerge bu"
    ):
        merge_models(path, tmp_path / "out")


def test_a_head_without_label_names_is_taken_as_it_is_with_a_note(tmp_path: Path) -> None:
    plan = plan_merge(load_merge(classifiers(tmp_path, {"base": None, "a": ["x", "y", "z"], "b": NUMBERED})))
    assert plan.notes == ("'b' names no labels; its head is taken to be in the order of 'a'",)
    assert not plan.labels.rows


@pytest.mark.parametrize("more", [{"classifier.other": (3, 6)}, {"classifier.bias_2": (3,)}])
def test_permuted_labels_whose_rows_cannot_be_told_are_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    path = classifiers(tmp_path, {"base": ["x", "y", "z"], "a": ["x", "y", "z"], "b": ["z", "x", "y"]}, more)
    with pytest.raises(
        MismatchError, match=r"'b' has the labels of 'base' in another order \(z, x, y\), and which rows"
    ):
        merge_models(path, tmp_path / "out")


def test_labels_of_a_head_that_is_not_merged_do_not_matter(family: Get, tmp_path: Path) -> None:
    path = classifiers(tmp_path, {"base": None, "a": ["x", "y"], "b": ["y", "x"]})  # of two labels, the head has three
    assert not plan_merge(load_merge(path)).labels.rows
