"""What leaves a twin answers as the twin does: plain transformers for a gate, PEFT for an expert or a stack of them."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests import tiny
from tests.tiny import EXPERTS, GATE_ORDER, Family
from twinmerge.errors import ArtifactError, GateError, OutputExistsError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.hf.loading import load_backbone
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import build
from twinmerge.jobs.export import export
from twinmerge.twin.artifact import TwinArtifact

Get = Callable[[str], Family]
Twins = Callable[..., Path]
FAMILIES = sorted(tiny.BASES)
TEXTS = [row["text"] for name in EXPERTS for row in tiny.text_rows(name, 2)]
GATE = {"ag": 0.7, "trec": 0.3}


def batch() -> dict[str, Tensor]:
    return dict(tiny.tokenizer()(TEXTS, return_tensors="pt", padding=True))


def rows_of(gate: dict[str, float]) -> Tensor:
    return torch.tensor([[gate.get(name, 0.0) for name in GATE_ORDER]] * len(TEXTS), dtype=torch.float64)


def adapted(twin: Path, adapter: Path) -> Any:
    """The shared expert as plain transformers loads it, with an adapter as PEFT does."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(tied|tie_word_embeddings|is_gradient_checkpointing).*")
        return PeftModel.from_pretrained(load_backbone(twin, dtype=torch.float64), adapter).eval()


# ---- dense


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_is_the_twin_under_its_gate(twin: Twins, tmp_path: Path, name: str) -> None:
    folder = twin(name, exclusive={"rank": 3, "embeddings": "exclusive"})
    note = export(folder, tmp_path / "out", to="dense", gate=GATE)
    automatic = transformers.AutoModelForCausalLM if name in ("gpt2", "llama") else None
    cls = automatic or transformers.AutoModelForSequenceClassification
    plain, x = cls.from_pretrained(tmp_path / "out").eval(), batch()
    model = TwinModel.from_pretrained(folder)
    with torch.no_grad():
        found = plain(**x).logits
    out = model(**x, gate=rows_of(GATE).float())
    expected = torch.stack(out.logits) if isinstance(out.logits, list) else out.logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert note["holds"]["gate"] == {"ag": 0.7, "sms": 0.0, "trec": 0.3}
    assert note["holds"]["head"] == (None if automatic else "ag")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(TEXTS[0])["input_ids"] == tiny.tokenizer()(TEXTS[0])["input_ids"]
    assert not (tmp_path / "out" / "twin.json").exists()
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == note


def test_dense_of_an_expert_of_whole_rank_is_that_expert(family: Get, twin: Twins, tmp_path: Path) -> None:
    export(twin("bert"), tmp_path / "out", to="dense", expert="sms")
    cls, x = transformers.AutoModelForSequenceClassification, batch()
    expert = cls.from_pretrained(family("bert").root / "sms").eval()
    with torch.no_grad():
        assert torch.allclose(cls.from_pretrained(tmp_path / "out").eval()(**x).logits, expert(**x).logits, atol=1e-5)


# ---- peft


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "exclusive", [{"rank": 3}, {"energy": 0.9}, {"rank": 0}, {"rank": 3, "dtype": "int4"}], ids=str
)
def test_adapter_on_the_shared_expert_is_the_expert(
    twin: Twins, tmp_path: Path, name: str, exclusive: dict[str, Any]
) -> None:
    folder = twin(name, exclusive=exclusive)
    note = export(folder, tmp_path / "out", to="peft")
    model, x = TwinModel.from_pretrained(folder, dtype=torch.float64), batch()
    for expert in GATE_ORDER:
        found = adapted(folder, tmp_path / "out" / expert)
        with torch.no_grad():
            states = found.get_base_model().base_model(**x)[0]
        expected = model.encode(rows_of({expert: 1.0}), **x)[0]
        assert torch.allclose(states, expected, atol=1e-6)  # norms are sums, stored in float32
        assert note["holds"][expert]["beside"] == []
        config = json.loads((tmp_path / "out" / expert / "adapter_config.json").read_text())
        base = config["base_model_name_or_path"]
        assert (tmp_path / "out" / expert / base).resolve() == folder
        assert (tmp_path / "out" / expert / "head").is_dir() == bool(model.heads)
        with torch.no_grad():
            merged = found.merge_and_unload()
            assert torch.allclose(merged.base_model(**x)[0], expected, atol=1e-6)


def test_several_adapters_on_one_model_do_not_disturb_each_other(twin: Twins, tmp_path: Path) -> None:
    folder = twin("bert", exclusive={"rank": 3})
    export(folder, tmp_path / "out", to="peft")
    model, x = TwinModel.from_pretrained(folder, dtype=torch.float64), batch()
    found = adapted(folder, tmp_path / "out" / "ag")
    found.load_adapter(tmp_path / "out" / "sms", "sms")
    for expert, name in (("sms", "sms"), ("ag", "default")):
        found.set_adapter(name)
        with torch.no_grad():
            states = found.get_base_model()(**x)[0]
        assert torch.allclose(states, model.encode(rows_of({expert: 1.0}), **x)[0], atol=1e-6)


def test_biases_lie_beside_where_a_pair_cannot_hold_them(twin: Twins, tmp_path: Path) -> None:
    """PEFT has no bias on the pair of an embedding, and one setting for all pairs."""
    folder = twin("bert", exclusive={"rank": 3, "embeddings": "exclusive"})
    held = export(folder, tmp_path / "out", to="peft")["holds"]["ag"]
    assert held["biases"] == 0
    assert held["beside"]
    assert all(name.endswith(".bias") and "LayerNorm" not in name for name in held["beside"])
    merged = adapted(folder, tmp_path / "out" / "ag").merge_and_unload()
    beside, x = Checkpoint.open(tmp_path / "out" / "ag" / "exclusive.safetensors"), batch()
    assert sorted(beside.specs) == held["beside"]
    with torch.no_grad():
        for name in beside.specs:
            merged.get_parameter(name).add_(beside.read(name).double())
        states = merged(**x)[0]
    model = TwinModel.from_pretrained(folder, dtype=torch.float64)
    assert torch.allclose(states, model.encode(rows_of({"ag": 1.0}), **x)[0], atol=1e-6)


# ---- stacked


@pytest.mark.parametrize("embeddings", ["shared", "exclusive"])
@pytest.mark.parametrize("name", FAMILIES)
def test_stacked_adapter_under_a_gate_is_the_twin_without_vectors(
    twin: Twins, tmp_path: Path, name: str, embeddings: str
) -> None:
    folder = twin(name, exclusive={"energy": 0.9, "embeddings": embeddings})  # ranks differ by matrix
    note = export(folder, tmp_path / "out", to="stacked-lora")
    stacked = json.loads((tmp_path / "out" / "stacked.json").read_text())
    assert stacked == json.loads(json.dumps(note["holds"]))
    found = adapted(folder, tmp_path / "out")
    gate = {"ag": 0.5, "sms": 0.3, "trec": -0.2}
    with torch.no_grad():
        for module, columns in stacked["columns"].items():
            layer = found.get_base_model().get_submodule(module)
            b = layer.lora_embedding_B["default"] if layer.lora_embedding_B else layer.lora_B["default"].weight
            assert max(stop for _, stop in columns.values()) == b.shape[1]
            for expert, (start, stop) in columns.items():
                b[:, start:stop] *= gate[expert]
        states = found.get_base_model().base_model(**batch())[0]
    artifact = TwinArtifact.open(folder)
    parts = {
        expert: {
            n: part.to(torch.float64) for n, part in artifact.exclusive(expert).items() if artifact.kinds[n] != "vector"
        }
        for expert in GATE_ORDER
    }
    model = TwinModel(load_backbone(folder, dtype=torch.float64), parts)
    assert torch.allclose(states, model.encode(rows_of(gate), **batch())[0], atol=1e-10)


def test_vectors_of_all_experts_are_rows(twin: Twins, tmp_path: Path) -> None:
    folder = twin("bert", exclusive={"rank": 3})
    export(folder, tmp_path / "out", to="stacked-lora")
    vectors = Checkpoint.open(tmp_path / "out" / "vectors.safetensors")
    artifact = TwinArtifact.open(folder)
    for row, expert in enumerate(GATE_ORDER):
        parts = artifact.exclusive(expert)
        for name in vectors.specs:
            part = parts.get(name)
            expected = part.dense() if part is not None else torch.zeros(vectors.specs[name].shape[1:])
            assert torch.equal(vectors.read(name)[row], expected)


def test_stack_of_nothing_is_a_map_without_an_adapter(twin: Twins, tmp_path: Path) -> None:
    assert export(twin("bert", exclusive={"rank": 0}), tmp_path / "out", to="stacked-lora")["holds"]["columns"] == {}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"export.json", "stacked.json", "vectors.safetensors"}


def test_stack_of_what_has_no_vectors_is_the_adapter_alone(tmp_path: Path) -> None:
    """LoRA experts: no norm and no bias was trained."""
    tiny.llama().save_pretrained(tmp_path / "base")
    tiny.tokenizer("left").save_pretrained(tmp_path / "base")
    for name in ("ag", "sms"):
        tiny.make_adapter(tmp_path, name, tiny.llama(), tiny.text_rows(name), target_modules=["q_proj"], r=2)
    build(Family(tmp_path, ("ag", "sms")).recipe(exclusive={"rank": 8}), tmp_path / "twin")
    export(tmp_path / "twin", tmp_path / "out", to="stacked-lora")
    assert not (tmp_path / "out" / "vectors.safetensors").exists()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "dense"}, "give weights by expert"),
        ({"to": "dense", "gate": GATE, "expert": "ag"}, "give weights by expert"),
        ({"to": "dense", "gate": {"spam": 1.0}}, "unknown expert 'spam'; this twin has ag, sms, trec"),
        ({"to": "dense", "expert": "spam"}, "unknown expert 'spam'"),
        ({"to": "dense", "gate": {"ag": 0.0}}, "a gate of zeros is the shared expert"),
        ({"to": "dense", "gate": {"ag": float("nan")}}, "gate must be finite"),
        ({"to": "peft", "gate": GATE}, "peft holds every expert and takes no gate"),
        ({"to": "stacked-lora", "expert": "ag"}, "stacked-lora holds every expert"),
    ],
)
def test_gates_that_do_not_fit_the_form_are_refused(
    twin: Twins, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(GateError, match=message):
        export(twin("bert"), tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["peft", "stacked-lora"])
def test_entries_fit_no_adapter(family: Get, tmp_path: Path, to: Any) -> None:
    build(family("bert").recipe(exclusive={"compression": "magnitude", "density": 0.1}), tmp_path / "twin")
    with pytest.raises(ArtifactError, match="keeps single entries .compression: magnitude., which no LoRA"):
        export(tmp_path / "twin", tmp_path / "out", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["twin"]
    export(tmp_path / "twin", tmp_path / "out", to="dense", expert="ag")


def test_folder_that_exists_is_kept(twin: Twins, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError):
        export(twin("bert"), tmp_path, to="peft")
    (tmp_path / "old.txt").write_text("x")
    export(twin("bert"), tmp_path, to="dense", expert="ag", overwrite=True)
    assert not (tmp_path / "old.txt").exists()


def test_licences_of_the_inputs_travel(family: Get, tmp_path: Path) -> None:
    copy = Family(Path(shutil.copytree(family("bert").root, tmp_path / "bert")))
    (copy.base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    build(copy.recipe(exclusive={"rank": 1}), tmp_path / "twin")
    licences = export(tmp_path / "twin", tmp_path / "out", to="dense", expert="ag")["licences"]
    assert licences == {"base": "apache-2.0", "ag": None, "sms": None, "trec": None}
