"""What other tools see of a twin: PEFT's adapters on plain transformers."""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests import tiny
from tests.tiny import EXPERTS, GATE_ORDER, Family
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.hf.loading import load_backbone
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import build
from twinmerge.tensors.parts import Part
from twinmerge.twin.artifact import TwinArtifact

pytestmark = pytest.mark.no_cover  # what these run is covered elsewhere, and tracing doubles their time


Get = Callable[[str], Family]
Twins = Callable[..., Path]
FAMILIES = sorted(tiny.BASES)
TEXTS = [row["text"] for name in EXPERTS for row in tiny.text_rows(name, 2)]


def batch() -> dict[str, Tensor]:
    return dict(tiny.tokenizer()(TEXTS, return_tensors="pt", padding=True))


def with_adapter(folder: Path, expert: str, dtype: torch.dtype = torch.float64) -> Any:
    """The shared expert as plain transformers loads it, one expert's adapter on it."""
    from peft import PeftModel

    backbone = load_backbone(folder, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about tied weights and about transformers
        return PeftModel.from_pretrained(backbone, folder / "experts" / expert).eval()


def without_vectors(folder: Path) -> TwinModel:
    """The twin with what PEFT carries, and nothing else."""
    artifact = TwinArtifact.open(folder)
    parts: Mapping[str, Mapping[str, Part]] = {
        expert: {
            name: part.to(torch.float64)
            for name, part in artifact.exclusive(expert).items()
            if artifact.kinds[name] not in ("vector", "grouped_conv")
        }
        for expert in artifact.expert_names
    }
    return TwinModel(load_backbone(folder, dtype=torch.float64), parts)


@pytest.mark.parametrize("embeddings", ["shared", "exclusive"])
@pytest.mark.parametrize("name", FAMILIES)
def test_adapter_on_the_shared_expert_is_the_twin_without_vectors(twin: Twins, name: str, embeddings: str) -> None:
    folder = twin(name, exclusive={"energy": 0.9, "embeddings": embeddings})  # ranks differ by matrix
    model, x = without_vectors(folder), batch()
    # PEFT gives an output layer tied to the embeddings no part of their adapter: there hidden states must do
    tied = embeddings == "exclusive" and name in ("gpt2", "roberta")
    for expert in GATE_ORDER:
        gate, adapted = model.one_hot([expert] * len(TEXTS)).double(), with_adapter(folder, expert).get_base_model()
        with torch.no_grad():
            found = (adapted.base_model if tied else adapted)(**x)[0]
        out = model(**x, gate=gate)
        expected = model.encode(gate, **x)[0] if tied or out.logits is None else out.logits
        assert torch.allclose(found, expected, atol=1e-10)


def test_adapter_of_eight_bits_is_what_the_twin_reads(twin: Twins) -> None:
    folder = twin("bert", exclusive={"energy": 0.9, "dtype": "float8_e4m3fn"})
    stored = Checkpoint.open(folder / "experts" / GATE_ORDER[0] / "adapter_model.safetensors")
    assert {spec.dtype for spec in stored.specs.values()} == {torch.float8_e4m3fn}
    model, x = without_vectors(folder), batch()
    for expert in GATE_ORDER:
        gate, adapted = model.one_hot([expert] * len(TEXTS)).double(), with_adapter(folder, expert).get_base_model()
        with torch.no_grad():
            found = adapted(**x)[0]
        assert torch.allclose(found, model.encode(gate, **x)[0], atol=1e-10)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_adapter_and_the_tensors_beside_it_applied_by_hand_are_the_twin(twin: Twins, name: str) -> None:
    folder = twin(name, exclusive={"rank": 3})
    model, x = TwinModel.from_pretrained(folder, dtype=torch.float64), batch()
    for expert in GATE_ORDER:
        merged = with_adapter(folder, expert).merge_and_unload()
        beside = Checkpoint.open(folder / "experts" / expert / "exclusive.safetensors")
        with torch.no_grad():
            for parameter in beside.specs:
                merged.get_parameter(parameter).add_(beside.read(parameter).double())
            found = merged.base_model(**x)[0]
        assert torch.allclose(found, model.encode(model.one_hot([expert] * len(TEXTS)).double(), **x)[0], atol=1e-10)


@pytest.mark.parametrize("embeddings", ["shared", "exclusive"])
def test_twin_of_lora_experts_is_each_of_them(tmp_path: Path, embeddings: str) -> None:
    """Adapters in, heads included; whole ranks give each expert back."""
    family, merged = tiny.adapter_family(tmp_path / "family")
    if embeddings == "shared":  # then nobody may train them
        model = transformers.BertForSequenceClassification.from_pretrained(family.base, num_labels=3)
        merged["sms"] = tiny.make_adapter(
            family.root, "sms", model, tiny.text_rows("sms"), r=2, target_modules=["query"], task_type="SEQ_CLS"
        )
    build(family.recipe(exclusive={"rank": 64, "embeddings": embeddings}), tmp_path / "twin")
    twin, x = TwinModel.from_pretrained(tmp_path / "twin"), batch()
    for expert, model in merged.items():
        with torch.no_grad():
            expected = model(**x).logits
        assert torch.allclose(torch.stack(twin(**x, expert=expert).logits), expected, atol=1e-5)


def test_adapter_of_a_twin_is_an_expert_of_the_next(family: Get, twin: Twins, tmp_path: Path) -> None:
    """What we write as an adapter we read as one."""
    folder = twin("llama", exclusive={"rank": 3})
    root = tmp_path / "next"
    shutil.copytree(folder, root / "base", ignore=shutil.ignore_patterns("experts", "router", "twin.json"))
    for expert in EXPERTS:
        shutil.copytree(folder / "experts" / expert, root / expert)
        (root / f"{expert}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.text_rows(expert)))
    build(Family(root).recipe(exclusive={"rank": 64}), tmp_path / "twin")
    model, x = TwinModel.from_pretrained(tmp_path / "twin"), batch()
    for expert in EXPERTS:
        with torch.no_grad():
            expected = with_adapter(folder, expert, torch.float32)(**x).logits
        assert torch.allclose(model(**x, expert=expert).logits, expected, atol=1e-5)


def test_twin_of_lora_experts_of_conv1d_layers_is_each_of_them(family: Get, tmp_path: Path) -> None:
    base = family("gpt2").base
    root = tmp_path / "family"
    shutil.copytree(base, root / "base")
    forms: dict[str, dict[str, Any]] = {
        "trec": {"r": 2, "target_modules": ["c_attn"]},
        "sms": {"r": 3, "target_modules": ["c_fc", "c_proj"], "use_rslora": True},
        "ag": {"r": 2, "target_modules": ["c_attn", "wpe"], "alpha_pattern": {"c_attn": 5}},
    }
    merged = {}
    for name, settings in forms.items():
        model = transformers.GPT2LMHeadModel.from_pretrained(base)
        rows = tiny.text_rows(name)
        merged[name] = tiny.make_adapter(root, name, model, rows, fan_in_fan_out=True, **settings)
    build(Family(root).recipe(exclusive={"rank": 64, "embeddings": "exclusive"}), tmp_path / "twin")
    twin, x = TwinModel.from_pretrained(tmp_path / "twin"), batch()
    for name, model in merged.items():
        with torch.no_grad():
            expected = model(**x).logits
        assert torch.allclose(twin(**x, expert=name).logits, expected, atol=1e-5)
