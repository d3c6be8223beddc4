"""LoRA adapters as tools write them: every key is understood or named, and nothing that was trained is dropped."""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests import tiny
from tests.hf.test_adapters import opened, saved
from tests.tiny import Family, rewrite
from twinmerge.errors import MismatchError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.hf.classes import LIBRARY
from twinmerge.models.adapter import AdapterExpert
from twinmerge.models.source import open_model

Get = Callable[[str], Family]
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
Change = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, PreTrainedModel]:
    """A base, an adapter of a classifier on it, and the two merged."""
    root = tmp_path_factory.mktemp("classifier")
    tiny.bert().save_pretrained(root / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(root / "base", num_labels=3)
    config = peft.LoraConfig(target_modules=["query"], r=2, task_type="SEQ_CLS")
    return root / "base", root / "a", saved(config, model, root / "a")


def changed(classifier: tuple[Path, Path, PreTrainedModel], folder: Path, change: Change) -> Path:
    shutil.copytree(classifier[1], folder / "a")
    rewrite(folder / "a" / "adapter_model.safetensors", change)
    return folder / "a"


SAME: dict[str, Change] = {
    "the adapter's name in the pairs": lambda t: {k.replace("lora_A.", "lora_A.default."): v for k, v in t.items()},
    "saved modules by their wrapper": lambda t: {
        k.replace(".classifier.", ".classifier.modules_to_save.default."): v for k, v in t.items()
    },
    "saved modules by an older wrapper": lambda t: {
        k.replace(".classifier.", ".classifier.modules_to_save."): v for k, v in t.items()
    },
    "the original beside the saved module": lambda t: {
        **t, "base_model.model.classifier.original_module.weight": torch.zeros(9)
    },
    "no prefix": lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()},
}  # fmt: skip


@pytest.mark.parametrize("form", SAME)
def test_names_as_tools_write_them_are_the_same_adapter(
    classifier: tuple[Path, Path, PreTrainedModel], tmp_path: Path, form: str
) -> None:
    base, _, merged = classifier
    expert = opened(changed(classifier, tmp_path, SAME[form]), base)
    assert isinstance(expert, AdapterExpert)
    assert len(expert.pairs) == 2
    for key, value in expert.read_head().items():
        assert torch.equal(value, merged.state_dict()[key])


ODD: dict[str, tuple[Change, str]] = {
    "empty": (lambda t: {}, "adapter 'a' holds no tensors of its own in adapter_model.safetensors"),
    "only originals": (
        lambda t: {"base_model.model.classifier.original_module.weight": torch.ones(1)},
        "adapter 'a' holds no tensors of its own",
    ),
    "key of no kind": (
        lambda t: {**t, "base_model.model.bert.odd.lora_magnitude_vector.weight": torch.ones(1)},
        "adapter 'a' holds 'base_model.model.bert.odd.lora_magnitude_vector.weight', which is neither of a pair nor a",
    ),
    "bias of a pair": (
        lambda t: {**t, f"{QUERY}.lora_B.bias": torch.ones(16)},
        f"adapter 'a' holds '{QUERY}.lora_B.bias', which is neither of a pair",
    ),
    "two adapters": (
        lambda t: {**t, f"{QUERY}.lora_A.other.weight": torch.ones(2, 16)},
        f"adapter 'a' holds both '{QUERY}.lora_A.",
    ),
    "half a pair": (
        lambda t: {k: v for k, v in t.items() if k != f"{QUERY}.lora_B.weight"},
        "adapter 'a' trains 'bert.encoder.layer.0.attention.self.query', which the base lacks",
    ),
    "a shard of nothing": (
        lambda t: {**t, f"{QUERY}.lora_A.weight": torch.ones(0)},
        f"adapter_model.safetensors holds 1 tensors without values, first '{QUERY}.lora_A.weight': DeepSpeed ZeRO-3",
    ),
    "a number for a matrix": (
        lambda t: {**t, f"{QUERY}.lora_A.weight": torch.tensor(1.0)},
        "adapter 'a': the pair [16, 2] x [] does not fit",
    ),
    "no direction": (
        lambda t: {**t, f"{QUERY}.lora_A.weight": torch.ones(0, 16), f"{QUERY}.lora_B.weight": torch.ones(16, 0)},
        "adapter 'a': the pair [16, 0] x [0, 16] does not fit",
    ),
    "another rank on each side": (
        lambda t: {**t, f"{QUERY}.lora_A.weight": torch.ones(3, 16)},
        "adapter 'a': the pair [16, 2] x [3, 16] does not fit",
    ),
    "fewer rows than the base": (
        lambda t: {**t, "base_model.model.bert.embeddings.word_embeddings.weight": torch.ones(62, 16)},
        "adapter 'a': 'bert.embeddings.word_embeddings.weight' has shape [62, 16], the base's "
        "'embeddings.word_embeddings.weight' [64, 16]; resize it",
    ),
    "another layer whole": (
        lambda t: {**t, "base_model.model.bert.encoder.layer.7.output.dense.bias": torch.ones(16)},
        "layer.7.output.dense.bias', which is neither of a pair nor a tensor of a BertForSequenceClassification",
    ),
    "no classifier": (
        lambda t: {k: v for k, v in t.items() if "classifier" not in k},
        "was trained on a BertForSequenceClassification, whose 'classifier.bias' neither it nor the base holds",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_not_understood_is_named(
    classifier: tuple[Path, Path, PreTrainedModel], tmp_path: Path, case: str
) -> None:
    change, message = ODD[case]
    with pytest.raises(MismatchError, match=re.escape(message)):
        opened(changed(classifier, tmp_path, change), classifier[0])


def test_pooler_that_the_base_lacks_is_named(classifier: tuple[Path, Path, PreTrainedModel], tmp_path: Path) -> None:
    transformers.BertModel(
        transformers.BertConfig.from_pretrained(classifier[0]), add_pooling_layer=False
    ).save_pretrained(tmp_path / "base")
    pooler = {
        f"base_model.model.pooler.dense.{leaf}": torch.zeros(size)
        for leaf, size in (("weight", (16, 16)), ("bias", 16))
    }
    folder = changed(classifier, tmp_path, lambda _: pooler)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "task_type": None}))
    with pytest.raises(MismatchError, match="adapter 'a' trains 'pooler.dense.bias', which the base lacks"):
        opened(folder, tmp_path / "base")


def test_embeddings_that_were_saved_as_they_were_change_nothing(family: Get, tmp_path: Path) -> None:
    base = family("llama").base
    model: Any = transformers.LlamaForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], r=2))
        adapted.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    stored = Checkpoint.open(tmp_path / "a" / "adapter_model.safetensors").specs
    assert any("embed_tokens.base_layer.weight" in name for name in stored)
    expert, found = opened(tmp_path / "a", base), Checkpoint.open(base)
    name = "model.embed_tokens.weight"
    assert name in expert.stored
    assert not expert.task_vector(name, found.read(name)).any()  # B of the pair is zero yet
    assert expert.factors(name) is None
    assert expert.factors("model.layers.0.self_attn.q_proj.weight") is not None


def test_pair_beside_a_saved_embedding_is_added_to_it(family: Get, tmp_path: Path) -> None:
    base = family("llama").base
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    merged = saved(peft.LoraConfig(target_modules=["embed_tokens"], r=2), model, tmp_path / "a")
    name, moved = "model.embed_tokens.weight", 0.5
    stored = Checkpoint.open(base).read(name)
    rewrite(
        tmp_path / "a" / "adapter_model.safetensors",
        lambda t: {**t, "base_model.model.model.embed_tokens.base_layer.weight": stored + moved},
    )
    expected = merged.state_dict()[name] - stored + moved
    assert torch.allclose(opened(tmp_path / "a", base).task_vector(name, stored), expected, atol=1e-6)


# ---- heads of the base


def test_adapter_of_a_base_with_a_head_answers_with_that_head(family: Get, tmp_path: Path) -> None:
    base = family("roberta").root / "sms"
    model = transformers.RobertaForSequenceClassification.from_pretrained(base)
    config = peft.LoraConfig(target_modules=["query", "dense", "out_proj"], r=2)  # dense and out_proj of the head too
    merged = saved(config, model, tmp_path / "a")
    expert = opened(tmp_path / "a", base)
    assert isinstance(expert, AdapterExpert)
    assert sorted(expert.head_pairs) == ["classifier.dense.weight", "classifier.out_proj.weight"]
    assert expert.config == Checkpoint.open(base).config  # its labels are the base's
    head = expert.read_head()
    assert sorted(head) == [f"classifier.{n}.{leaf}" for n in ("dense", "out_proj") for leaf in ("bias", "weight")]
    for key, value in head.items():
        assert torch.allclose(value, merged.state_dict()[key], atol=1e-6)
    assert sum(expert.head_source(name).specs[name].nbytes for name in expert.head) == 4 * (16 * 16 + 16 + 3 * 16 + 3)


def test_labels_of_a_head_that_was_trained_anew_have_no_names_of_the_bases(family: Get, tmp_path: Path) -> None:
    base = family("bert").root / "sms"
    config = transformers.BertConfig.from_pretrained(base)
    config.id2label, config.problem_type = {0: "a", 1: "b", 2: "c"}, "regression"
    model = transformers.BertForSequenceClassification.from_pretrained(base, config=config)
    model.save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["query"], "r": 2, "task_type": "SEQ_CLS"}
    saved(peft.LoraConfig(**settings), model, tmp_path / "a")
    found = opened(tmp_path / "a", tmp_path / "base").config
    assert found["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert not {"label2id", "problem_type"} & found.keys()


# ---- tied weights


def test_pair_on_tied_weights_is_what_peft_merges_and_is_noted(family: Get, tmp_path: Path) -> None:
    base = family("gpt2").base
    tied = "transformer.wte.weight"
    own = Checkpoint.open(base).read(tied)
    for target in ("wte", "lm_head"):
        model = transformers.GPT2LMHeadModel.from_pretrained(base)
        merged = saved(peft.LoraConfig(target_modules=[target], r=2), model, tmp_path / target)
        expert = opened(tmp_path / target, base)
        assert torch.allclose(own + expert.task_vector(tied, own), merged.state_dict()[tied], atol=1e-6)
        assert len(expert.notes) == 1
        assert f"{target}', which is tied to another: both change, as in PEFT's merge" in expert.notes[0]
    model = transformers.GPT2LMHeadModel.from_pretrained(base)
    saved(peft.LoraConfig(target_modules=["wte", "lm_head"], r=2), model, tmp_path / "both")
    with pytest.raises(
        MismatchError, match="adapter 'both' trains '.*' and what is tied to it; merge it into its base"
    ):
        opened(tmp_path / "both", base)


def test_output_layer_that_was_trained_apart_from_its_embeddings_is_named(family: Get, tmp_path: Path) -> None:
    base = family("gpt2").base
    for moved in (0.0, 1.0):
        model = transformers.GPT2LMHeadModel.from_pretrained(base)
        saved(peft.LoraConfig(target_modules=["wpe"], r=2), model, tmp_path / "a")
        own = Checkpoint.open(base).read("transformer.wte.weight") + moved
        file = tmp_path / "a" / "adapter_model.safetensors"
        rewrite(file, lambda t, own=own: {**t, "base_model.model.lm_head.weight": own})
        if moved:
            with pytest.raises(
                MismatchError, match=r"trains 'lm_head\.weight' apart from 'transformer\.wte\.weight', to"
            ):
                opened(tmp_path / "a", base)
        else:
            assert "transformer.wte.weight" not in opened(tmp_path / "a", base).stored


# ---- names of other versions of transformers


def test_names_of_an_older_version_are_those_of_the_class(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    tiny.seeded(transformers.ViTModel, config).save_pretrained(tmp_path / "base")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["classifier"])
    merged = saved(config, model, tmp_path / "a")
    old, new = "vit.encoder.layer.0.attention.attention.query", "vit.layers.0.attention.q_proj"
    rewrite(tmp_path / "a" / "adapter_model.safetensors", lambda t: {k.replace(new, old): v for k, v in t.items()})
    expert, name = opened(tmp_path / "a", tmp_path / "base"), "layers.0.attention.q_proj.weight"
    own = open_model(tmp_path / "base", LIBRARY).checkpoint.read(name)
    assert torch.allclose(own + expert.task_vector(name, own), merged.state_dict()[f"vit.{name}"], atol=1e-6)


def test_pairs_on_what_a_class_joins_are_merged_by_peft(tmp_path: Path) -> None:
    config = tiny.text_config(transformers.MixtralConfig, num_key_value_heads=1, num_local_experts=2)
    tiny.seeded(transformers.MixtralForCausalLM, config).save_pretrained(tmp_path / "base")
    model = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "base")
    saved(peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"), model, tmp_path / "a")
    shapes = {"w1": (32, 16), "w2": (16, 32), "w3": (32, 16)}
    pairs = {
        (i, e, w): (torch.randn(2, s[1]), torch.randn(s[0], 2))
        for i in (0, 1)
        for e in (0, 1)
        for w, s in shapes.items()
    }
    place = "base_model.model.model.layers.{}.block_sparse_moe.experts.{}.{}.lora_{}.weight"
    sides = {place.format(*key, side): pair[side == "B"] for key, pair in pairs.items() for side in "AB"}
    rewrite(tmp_path / "a" / "adapter_model.safetensors", lambda t: {**t, **sides})
    settings = tmp_path / "a" / "adapter_config.json"
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps({**content, "target_modules": ["q_proj", *shapes]}))
    expert, base = opened(tmp_path / "a", tmp_path / "base"), open_model(tmp_path / "base", LIBRARY).checkpoint
    products = {key: 4 * b @ a for key, (a, b) in pairs.items()}  # lora_alpha 8 over rank 2
    for layer in (0, 1):
        up, down = (f"model.layers.{layer}.mlp.experts.{side}_proj" for side in ("gate_up", "down"))
        for one in (0, 1):
            joined = torch.cat([products[layer, one, "w1"], products[layer, one, "w3"]])
            assert torch.allclose(expert.task_vector(up, base.read(up))[one], joined, atol=1e-5)
            assert torch.allclose(expert.task_vector(down, base.read(down))[one], products[layer, one, "w2"], atol=1e-5)


def test_pair_of_float64_keeps_its_digits(family: Get, tmp_path: Path) -> None:
    base = family("llama").base
    saved(
        peft.LoraConfig(target_modules=["q_proj"], r=2),
        transformers.LlamaForCausalLM.from_pretrained(base),
        tmp_path / "a",
    )
    rewrite(tmp_path / "a" / "adapter_model.safetensors", lambda t: {k: v.double() / 3 for k, v in t.items()})
    name = "model.layers.0.self_attn.q_proj.weight"
    factors = opened(tmp_path / "a", base).factors(name)
    assert factors is not None
    stored = Checkpoint.open(tmp_path / "a" / "adapter_model.safetensors")
    a, b = (stored.read(f"base_model.model.model.layers.0.self_attn.q_proj.lora_{s}.weight") for s in "AB")
    assert torch.allclose(factors.dense(), b @ a * 4, atol=1e-14, rtol=0)
