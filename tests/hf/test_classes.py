"""Heads by class: whatever a base brings beside its backbone, every expert keeps its own head and its weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests import tiny
from tests.tiny import EXPERTS, LABELS, Family, rewrite
from twinmerge.errors import CheckpointError, MismatchError
from twinmerge.files import scratch
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.hf.classes import LIBRARY
from twinmerge.hf.heads import answered, load_head
from twinmerge.hf.loading import load_config, model_from
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import build
from twinmerge.twin.plan import Plan

TEXT: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": tiny.POSITIONS,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
SIDES = {key: TEXT[key] for key in list(TEXT)[1:5]}
IMAGE: dict[str, Any] = {**SIDES, "image_size": 16, "patch_size": 8}
T5 = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
}
BART = {"vocab_size": 64, "d_model": 16, "max_position_embeddings": 32, "pad_token_id": 0, "eos_token_id": 3} | {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
}
FAMILIES: dict[str, tuple[str, dict[str, Any], str, tuple[str, ...]]] = {
    "bert with a head": ("BertForSequenceClassification", TEXT, "BertForSequenceClassification", ("classifier",)),
    "bert without a pooler": ("BertForMaskedLM", TEXT, "BertForSequenceClassification", ("bert.pooler", "classifier")),
    "bert whose experts do without the pooler": ("BertModel", TEXT, "BertForTokenClassification", ("classifier",)),
    "bert of two sentences": ("BertForPreTraining", TEXT, "BertForQuestionAnswering", ("qa_outputs",)),
    "modernbert": ("ModernBertForMaskedLM", TEXT, "ModernBertForSequenceClassification", ("classifier", "head")),
    "albert without a pooler": (
        "AlbertForMaskedLM", TEXT | {"embedding_size": 8}, "AlbertForSequenceClassification",
        ("albert.pooler", "classifier"),
    ),
    "electra": (
        "ElectraForPreTraining", TEXT | {"embedding_size": 8}, "ElectraForSequenceClassification", ("classifier",)
    ),
    "deberta": ("DebertaV2ForMaskedLM", TEXT, "DebertaV2ForSequenceClassification", ("classifier", "pooler")),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 32},
        "DistilBertForSequenceClassification", ("classifier", "pre_classifier"),
    ),
    "roberta": ("RobertaForMaskedLM", TEXT, "RobertaForSequenceClassification", ("classifier",)),
    "xlm-roberta": ("XLMRobertaForMaskedLM", TEXT, "XLMRobertaForTokenClassification", ("classifier",)),
    "llama": ("LlamaForCausalLM", TEXT, "LlamaForSequenceClassification", ("score",)),
    "llama with a head": ("LlamaForSequenceClassification", TEXT, "LlamaForSequenceClassification", ("score",)),
    "gpt2": (
        "GPT2LMHeadModel", {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2,
        "pad_token_id": 0}, "GPT2ForSequenceClassification", ("score",),
    ),
    "t5": ("T5EncoderModel", T5, "T5ForTokenClassification", ("classifier",)),
    "bart": ("BartForConditionalGeneration", BART, "BartForSequenceClassification", ("classification_head",)),
    "vit": ("ViTModel", IMAGE, "ViTForImageClassification", ("classifier",)),
    "clip": ("CLIPVisionModel", IMAGE, "CLIPForImageClassification", ("classifier",)),
    "siglip": ("SiglipVisionModel", IMAGE, "SiglipForImageClassification", ("classifier",)),
    "beit": ("BeitForMaskedImageModeling", IMAGE, "BeitForImageClassification", ("beit.pooler", "classifier")),
}  # fmt: skip


def tuned(cls: type[PreTrainedModel], base: Path, seed: int, **settings: Any) -> PreTrainedModel:
    """The base as transformers itself loads it into a class, every weight moved."""
    torch.manual_seed(seed)
    model = cls.from_pretrained(base, **settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def made(root: Path, name: str) -> tuple[Family, dict[str, PreTrainedModel]]:
    """A family's folders and its experts as models."""
    base, settings, expert, _ = FAMILIES[name]
    config = getattr(transformers, base).config_class(**settings)
    tiny.seeded(getattr(transformers, base), config).save_pretrained(root / "base")
    experts = {}
    for seed, own in enumerate(EXPERTS):
        cls = getattr(transformers, expert)
        labels = cls.config_class.from_pretrained(root / "base")
        if base.endswith("VisionModel"):
            labels = cls.config_class(vision_config=settings, text_config=SIDES)
        labels.num_labels = 2 if "Answering" in expert else LABELS[own] + (name == "bart")  # whose configs lose a 2
        experts[own] = tuned(cls, root / "base", seed, config=labels, ignore_mismatched_sizes=True)
        experts[own].save_pretrained(root / own)
        (root / f"{own}.jsonl").write_text("x")
    return Family(root), experts


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    if "pixel_values" in model.main_input_name:
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": torch.tensor([[5, 6, 7, 8, 3], [9, 10, 11, 12, 3]]), "attention_mask": torch.ones(2, 5).long()}


def answer_of_parts(plan: Plan, name: str, x: dict[str, Tensor]) -> Tensor:
    """What a twin of full rank says under an expert's own gate: the shared class with its values, then its head."""
    expert, base = plan.experts[name], plan.base
    state = {}
    for parameter in base.specs:
        state[parameter] = value = base.read(parameter)
        if expert.is_adapter or parameter in expert.stored:
            state[parameter] = value + expert.task_vector(parameter, value).to(value.dtype)
    config = load_config(base.path)
    backbone: Any = model_from(getattr(transformers, base.config["architectures"][0]), config, state)
    with torch.no_grad():
        return answered(load_head(expert.config, expert.read_head()), backbone.base_model(**x, return_dict=True), x)


def logits_of(model: Any, x: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**x)
    return out.logits if "logits" in out else torch.stack([out.start_logits, out.end_logits], dim=-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_expert_is_its_share_of_the_backbone_and_its_own_head(tmp_path: Path, name: str) -> None:
    family, experts = made(tmp_path, name)
    plan = family.plan()
    head = FAMILIES[name][3]
    for own, model in experts.items():
        found = plan.experts[own].read_head()
        assert tuple(sorted({next(h for h in head if key.startswith(h)) for key in found})) == head
        for key, value in found.items():
            assert torch.equal(value, model.state_dict()[key])
        x = inputs(model)
        assert torch.allclose(answer_of_parts(plan, own, x), logits_of(model, x), atol=1e-5)
        assert plan.experts[own].config == json.loads((tmp_path / own / "config.json").read_text())
    expected = {n for n, e in experts.items() for key in e.state_dict() if key.startswith(head)}
    assert expected == set(EXPERTS)
    assert not any(task.name.startswith(head) for task in plan.tasks)


def as_published(folder: Path) -> None:
    """bert-base-uncased: heads for masked words and two sentences, pooler, old names, named as ForMaskedLM."""

    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    rewrite(folder / "model.safetensors", lambda tensors: {old(name): tensor for name, tensor in tensors.items()})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    assert "bert.embeddings.LayerNorm.gamma" in Checkpoint.open(folder).specs


def published(root: Path, expert_class: str, **settings: Any) -> tuple[Family, dict[str, PreTrainedModel]]:
    tiny.seeded(transformers.BertForPreTraining, tiny.text_config(transformers.BertConfig)).save_pretrained(
        root / "base"
    )
    as_published(root / "base")
    tiny.tokenizer().save_pretrained(root / "base")
    experts = {}
    for seed, own in enumerate(EXPERTS):
        labels = {"num_labels": LABELS[own]} if settings.get("labels") else {}
        experts[own] = tuned(getattr(transformers, expert_class), root / "base", seed, **labels)
        experts[own].save_pretrained(root / own)
        (root / f"{own}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.text_rows(own)))
    return Family(root), experts


def test_published_bert_is_a_base_of_classifiers_with_its_pooler_in_the_backbone(tmp_path: Path) -> None:
    family, experts = published(tmp_path, "BertForSequenceClassification", labels=True)
    recipe = family.recipe(exclusive={"rank": 64, "embeddings": "exclusive"})
    artifact = build(recipe, tmp_path / "twin")
    assert artifact.shared.config["architectures"] == ["BertModel"]
    assert "pooler.dense.weight" in artifact.shared.specs
    assert artifact.manifest.notes == [
        "base: 'cls.predictions.bias' and 6 more are left out, which a BertModel does not use here"
    ]
    twin = TwinModel.from_pretrained(tmp_path / "twin")
    x = dict(tiny.tokenizer()([row["text"] for row in tiny.text_rows("sms", 4)], return_tensors="pt", padding=True))
    for column, own in enumerate(twin.expert_names):
        expected = logits_of(experts[own], x)
        assert torch.allclose(torch.stack(twin(**x, expert=own).logits), expected, atol=1e-5)
        plain = twin.materialize(torch.eye(3)[column])
        assert torch.allclose(logits_of(plain, x), expected, atol=1e-5)


def test_published_bert_is_a_base_of_encoders_and_of_models_of_masked_words(tmp_path: Path) -> None:
    family, experts = published(tmp_path / "encoders", "BertModel")
    plan = family.plan()
    assert plan.base.config["architectures"] == ["BertModel"]
    assert all(not expert.head for expert in plan.experts.values())
    for own, model in experts.items():
        for parameter, value in model.state_dict().items():
            base = plan.base.read(parameter)
            assert torch.allclose(base + plan.experts[own].task_vector(parameter, base), value, atol=1e-6)
    plan = published(tmp_path / "masked", "BertForMaskedLM")[0].plan()
    assert plan.base.config["architectures"] == ["BertForMaskedLM"]
    assert next(task for task in plan.tasks if task.name == "cls.predictions.transform.dense.weight").experts
    assert "pooler" in plan.notes[0]


def test_own_pooler_answers_through_the_twin_and_in_a_plain_model(tmp_path: Path) -> None:
    family, experts = made(tmp_path, "bert without a pooler")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    for own in EXPERTS:
        rows = tiny.text_rows(own)
        (tmp_path / f"{own}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    artifact = build(family.recipe(exclusive={"rank": 64, "embeddings": "exclusive"}), tmp_path / "twin")
    assert not any("pooler" in name for name in artifact.shared.specs)
    twin, x = TwinModel.from_pretrained(tmp_path / "twin"), inputs(experts["sms"])
    for column, own in enumerate(twin.expert_names):
        expected = logits_of(experts[own], x)
        assert torch.allclose(torch.stack(twin(**x, expert=own).logits), expected, atol=1e-5)
        assert torch.allclose(logits_of(twin.materialize(torch.eye(3)[column]), x), expected, atol=1e-5)


# ---- refused by name


@pytest.mark.parametrize(
    ("base", "settings", "expert", "message"),
    [
        (
            "T5ForConditionalGeneration", T5, "T5ForSequenceClassification",
            "is a T5ForSequenceClassification on a T5Model, the base a T5ForConditionalGeneration; give the base as "
            "what T5Model.from_pretrained and save_pretrained make of it",
        ),
        (
            "BertModel", TEXT, "BertForMaskedLM",
            "is a BertForMaskedLM, whose output layer all experts share with the base, but not all are of that class; "
            "give the base and every expert as a BertForMaskedLM",
        ),
        ("LlamaModel", TEXT, "LlamaForCausalLM", "give the base and every expert as a LlamaForCausalLM"),
    ],
)  # fmt: skip
def test_class_on_another_backbone_is_named(
    tmp_path: Path, base: str, settings: dict[str, Any], expert: str, message: str
) -> None:
    made_base = getattr(transformers, base)
    tiny.seeded(made_base, made_base.config_class(**settings)).save_pretrained(tmp_path / "base")
    for seed, own in enumerate(EXPERTS):
        tuned(getattr(transformers, expert), tmp_path / "base", seed).save_pretrained(tmp_path / own)
        (tmp_path / f"{own}.jsonl").write_text("x")
    with pytest.raises(MismatchError) as caught:
        Family(tmp_path).plan()
    assert message in str(caught.value)


def test_one_speaker_among_classifiers_is_named(tmp_path: Path) -> None:
    family, _ = made(tmp_path, "llama")
    tuned(transformers.LlamaForCausalLM, family.base, 9).save_pretrained(tmp_path / "sms")
    with pytest.raises(MismatchError, match="expert 'sms' is a LlamaForCausalLM, whose output layer all experts share"):
        family.plan()


def test_tied_tensors_that_are_stored_twice_must_be_equal(tmp_path: Path) -> None:
    model = tiny.gpt2()
    model.save_pretrained(tmp_path / "base")
    for own in EXPERTS:
        model.save_pretrained(tmp_path / own)
        (tmp_path / f"{own}.jsonl").write_text("x")
    tied = "transformer.wte.weight"
    rewrite(tmp_path / "base" / "model.safetensors", lambda t: {**t, "lm_head.weight": t[tied].clone()})
    rewrite(tmp_path / "sms" / "model.safetensors", lambda t: {"lm_head.weight": t.pop(tied), **t})
    plan = Family(tmp_path).plan()
    assert "lm_head.weight" not in plan.base.specs
    assert plan.experts["sms"].stored[tied] == tied
    rewrite(tmp_path / "base" / "model.safetensors", lambda t: {**t, "lm_head.weight": t[tied] + 1})
    with pytest.raises(MismatchError, match=r"'lm_head\.weight' and 'transformer\.wte\.weight' are one tensor, but"):
        Family(tmp_path).plan()


# ---- what transformers joins or splits on loading


def mixtral(folder: Path, **settings: Any) -> PreTrainedModel:
    config = tiny.text_config(transformers.MixtralConfig, num_key_value_heads=1, num_local_experts=2, **settings)
    model = tiny.seeded(transformers.MixtralForCausalLM, config)
    model.save_pretrained(folder)
    return model


def test_tensors_that_a_class_joins_on_loading_are_those_of_its_model(tmp_path: Path) -> None:
    model = mixtral(tmp_path / "base")
    assert any(".experts.0." in name for name in Checkpoint.open(tmp_path / "base").specs)
    experts = {}
    for seed, own in enumerate(EXPERTS):
        experts[own] = tuned(transformers.MixtralForCausalLM, tmp_path / "base", seed)
        experts[own].save_pretrained(tmp_path / own)
        (tmp_path / f"{own}.jsonl").write_text("x")
    plan = Family(tmp_path).plan()
    assert set(plan.base.specs) == set(model.state_dict())
    for parameter, value in model.state_dict().items():
        assert torch.equal(plan.base.read(parameter), value)
        for own, expert in experts.items():
            vector = plan.experts[own].task_vector(parameter, value)
            assert torch.allclose(vector, expert.state_dict()[parameter] - value)
    assert {file.parent for file in plan.files} == {tmp_path, tmp_path / "base", *(tmp_path / own for own in EXPERTS)}


def test_tensors_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    mixtral(tmp_path / "base")
    (tmp_path / "sms.jsonl").write_text("x")
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    rewrite(tmp_path / "base" / "model.safetensors", lambda t: {**t, name: t[name][:, :3]})
    with pytest.raises(MismatchError, match=r"base: 'model\.layers\.0.*' and '.*gate_up_proj' do not fit"):
        Family(tmp_path, ("sms", "ag")).plan()


def test_no_room_for_joined_tensors_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = scratch.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda _: usage._replace(free=1))
    mixtral(tmp_path / "base")
    with pytest.raises(
        CheckpointError, match=r"must have [\d,]+ bytes free .*, found 1; name another folder in TMPDIR"
    ):
        LIBRARY.by_class(Checkpoint.open(tmp_path / "base"), tmp_path / "base", None)
