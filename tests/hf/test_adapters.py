"""Adapters of every kind that PEFT has: each is the expert that PEFT makes of it, or is refused by name."""

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import PreTrainedModel

from tests import tiny
from tests.tiny import Family, rewrite
from twinmerge.errors import MismatchError, MissingExtraError
from twinmerge.hf.classes import LIBRARY
from twinmerge.jobs.build import build
from twinmerge.models.adapter import AdapterExpert
from twinmerge.models.expert import open_expert, shared_model
from twinmerge.models.source import Expert, open_model
from twinmerge.twin.recipe import Recipe

Get = Callable[[str], Family]
LLAMA = ["q_proj", "v_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10, "init_r": 4},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 8},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "OFT": {"r": 0, "oft_block_size": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": None, "token_indices": [1, 6]},
    "VBLORA": {"num_vectors": 8, "vector_length": 4},
    "WAVEFT": {"n_frequency": 8},
}
NO_WEIGHTS = {
    "ADAPTION_PROMPT", "BEFT", "CARTRIDGE", "CPT", "LILY", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING",
    "PROMPT_TUNING", "P_TUNING", "SHADOW", "XLORA",
}  # fmt: skip
"""Of these PEFT makes no change of weights, or none that it can merge here."""


def opened(folder: Path, base: Path) -> Expert:
    model = open_model(base, LIBRARY)
    shared = shared_model(model, [folder], LIBRARY)
    conv1d = {name for name in shared.checkpoint.specs if name.endswith(("c_attn.weight", "c_proj.weight"))}
    return open_expert(folder.name, folder, model, shared, conv1d, LIBRARY)


def saved(config: Any, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Write an adapter whose every trained number moved; gives what PEFT merges."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad and parameter.is_floating_point():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        adapted.save_pretrained(folder, save_embedding_layers=False)
        merged: PreTrainedModel = adapted.eval().merge_and_unload()
    return merged.eval()


def require_same(expert: Expert, base: Path, merged: PreTrainedModel, prefix: str = "") -> None:
    moved = 0
    model = open_model(base, LIBRARY)
    for name, value in merged.state_dict().items():
        if name in model.checkpoint.specs:
            own = model.checkpoint.read(name)
            found = own + expert.task_vector(name, own) if expert.is_adapter or name in expert.stored else own
            assert torch.allclose(found, value, atol=1e-5), name
            moved += not torch.equal(value, own)
    assert moved


@pytest.mark.parametrize("kind", sorted(kind.value for kind in PeftType))
def test_adapter_of_every_kind_is_what_peft_merges_or_refused_by_name(family: Get, tmp_path: Path, kind: str) -> None:
    base = family("llama").base
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    fields = {field.name for field in dataclasses.fields(cls)}
    settings = {"target_modules": LLAMA} if "target_modules" in fields else {}
    settings = {**settings, **SETTINGS.get(kind, {})}
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    if kind in NO_WEIGHTS:
        (tmp_path / "a").mkdir()
        content = {"peft_type": kind, "task_type": "CAUSAL_LM", **settings, "num_virtual_tokens": 2}
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(content))
        from safetensors.torch import save_file

        save_file({"prompt_embeddings": torch.ones(2, 16)}, tmp_path / "a" / "adapter_model.safetensors")
        with pytest.raises(MismatchError, match=f"is a {kind} adapter that PEFT cannot merge into this base .*; only"):
            opened(tmp_path / "a", base)
        return
    merged = saved(cls(task_type="CAUSAL_LM", **settings), model, tmp_path / "a")
    expert = opened(tmp_path / "a", base)
    assert expert.is_adapter == (kind == "LORA")
    assert expert.checkpoint.path.parent == tmp_path / "a"  # what a manifest names and hashes
    assert (kind == "LORA") != any("was merged by PEFT" in note for note in expert.notes)
    require_same(expert, base, merged)


FORMS: dict[str, tuple[dict[str, Any], bool]] = {
    "all linear": ({"target_modules": "all-linear", "bias": "all"}, True),
    "some layers": ({"target_modules": LLAMA, "layers_to_transform": [1], "layers_pattern": "layers"}, True),
    "patterns": (
        {
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 2, "k_proj": 3},
            "alpha_pattern": {r"layers\.\d+\.self_attn\.k_proj": 5, "1.self_attn.v_proj": 7},
            "use_rslora": True,
        },
        True,
    ),
    "norms whole": ({"target_modules": LLAMA, "modules_to_save": ["input_layernorm", "norm"]}, True),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, True),
    "output layer": ({"target_modules": ["lm_head"]}, True),
    "dora": ({"target_modules": LLAMA, "use_dora": True}, False),
    "bias of the pair": ({"target_modules": LLAMA, "lora_bias": True}, False),
    "tokens": ({"target_modules": LLAMA, "trainable_token_indices": [4, 9]}, False),
    "pissa": ({"target_modules": LLAMA, "init_lora_weights": "pissa"}, False),
    "olora": ({"target_modules": LLAMA, "init_lora_weights": "olora"}, False),
    "orthogonal": ({"target_modules": LLAMA, "init_lora_weights": "orthogonal", "r": 4}, True),
    "parameters": ({"target_parameters": ["mlp.up_proj.weight"], "target_modules": []}, False),
}


@pytest.mark.parametrize("form", FORMS)
def test_lora_of_every_form_is_what_peft_merges(family: Get, tmp_path: Path, form: str) -> None:
    base = family("llama").base
    settings, plain = FORMS[form]
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    if form == "bias of the pair":
        config = tiny.text_config(transformers.LlamaConfig, num_key_value_heads=1, attention_bias=True)
        tiny.seeded(transformers.LlamaForCausalLM, config).save_pretrained(tmp_path / "base")
        base = tmp_path / "base"
        model = transformers.LlamaForCausalLM.from_pretrained(base)
    merged = saved(peft.LoraConfig(**{"r": 4, **settings}, task_type="CAUSAL_LM"), model, tmp_path / "a")
    expert = opened(tmp_path / "a", base)
    assert isinstance(expert, AdapterExpert) == plain
    require_same(expert, base, merged)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"alora_invocation_tokens": [1]}, "PEFT cannot merge"),
        ({"layer_replication": [[0, 2], [0, 2]]}, r"has \d+ tensors that the base lacks"),
    ],
)
def test_lora_that_is_no_change_of_weights_is_named(
    family: Get, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    base = family("llama").base
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(target_modules=LLAMA, r=2, task_type="CAUSAL_LM", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "a")
    with pytest.raises(MismatchError, match=reason):
        opened(tmp_path / "a", base)


# ---- heads, through PEFT


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("name", "cls", "targets"),
    [
        ("gpt2", "GPT2ForSequenceClassification", ["c_attn"]),
        ("bert", "BertForSequenceClassification", ["query", "value"]),
        ("llama", "LlamaForSequenceClassification", LLAMA),
        ("roberta", "RobertaForSequenceClassification", ["query", "dense"]),
    ],
)
def test_classifier_adapter_brings_its_head_and_its_labels(
    family: Get, tmp_path: Path, name: str, cls: str, targets: list[str], dora: bool
) -> None:
    base = family(name).base
    made = getattr(transformers, cls)
    model = made.from_pretrained(base, num_labels=5)
    settings = {"target_modules": targets, "r": 2, "task_type": "SEQ_CLS", "use_dora": dora}
    if name == "gpt2":
        settings["fan_in_fan_out"] = True
    merged = saved(peft.LoraConfig(**settings), model, tmp_path / "a")
    expert = opened(tmp_path / "a", base)
    assert expert.is_adapter != dora
    assert expert.config["architectures"] == [cls]
    assert len(expert.config["id2label"]) == 5
    state = merged.state_dict()
    head = expert.read_head()
    assert head
    for key, value in head.items():
        assert torch.allclose(value, state[key], atol=1e-6)
    shared = shared_model(open_model(base, LIBRARY), [tmp_path / "a"], LIBRARY)
    root = made.base_model_prefix
    for parameter in shared.checkpoint.specs:
        own = shared.checkpoint.read(parameter)
        if f"{root}.{parameter}" in state and (expert.is_adapter or parameter in expert.stored):
            found = own + expert.task_vector(parameter, own)
            assert torch.allclose(found, state[f"{root}.{parameter}"], atol=1e-5), parameter


def test_head_that_was_trained_on_random_values_is_named(family: Get, tmp_path: Path) -> None:
    base = family("distilbert").base
    for dora in (False, True):
        model = transformers.DistilBertForSequenceClassification.from_pretrained(base)
        config = peft.LoraConfig(target_modules=["q_lin"], r=2, task_type="SEQ_CLS", use_dora=dora)
        saved(config, model, tmp_path / f"{dora}")
        rewrite(  # as older versions of PEFT saved it
            tmp_path / f"{dora}" / "adapter_model.safetensors",
            lambda t: {k: v for k, v in t.items() if "pre_classifier" not in k},
        )
        message = r"was trained on a DistilBert.*, whose 'pre_classifier\.(bias|weight)' neither it nor the base holds"
        with pytest.raises(MismatchError, match=message):
            opened(tmp_path / f"{dora}", base)


@pytest.mark.parametrize("kind", [peft.LoHaConfig(target_modules=LLAMA), peft.LoraConfig(use_dora=True, r=2)])
def test_adapters_that_peft_merges_are_built_and_checked(family: Get, tmp_path: Path, kind: peft.PeftConfig) -> None:
    """Their folders have no config.json; how they write texts is the base's."""
    base = family("llama").base
    kind.task_type, kind.target_modules = "CAUSAL_LM", LLAMA
    for name in ("one", "two"):
        saved(kind, transformers.LlamaForCausalLM.from_pretrained(base), tmp_path / name)
        (tmp_path / f"{name}.jsonl").write_bytes((family("llama").root / "sms.jsonl").read_bytes())
    experts = {name: {"model": name, "router_data": f"{name}.jsonl"} for name in ("one", "two")}
    recipe = Recipe(
        base=str(base), experts=experts, root=tmp_path, exclusive={"rank": 4}, router={"features": "tokens"}
    )
    found = build(recipe, tmp_path / "twin").manifest
    assert found.check is not None
    assert sum("was merged by PEFT" in note for note in found.notes) == 2


def test_peft_that_is_not_installed_is_an_install_line(
    family: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = family("llama").base
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    saved(peft.LoHaConfig(target_modules=LLAMA), model, tmp_path / "a")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"is merged by PEFT: pip install 'twinmerge\[peft\]'"):
        opened(tmp_path / "a", base)


@pytest.mark.parametrize("change", ["unknown", "missing"])
def test_key_that_peft_would_drop_is_named(family: Get, tmp_path: Path, change: str) -> None:
    base = family("llama").base
    saved(peft.LoHaConfig(target_modules=LLAMA), transformers.LlamaForCausalLM.from_pretrained(base), tmp_path / "a")

    file = tmp_path / "a" / "adapter_model.safetensors"
    if change == "unknown":
        rewrite(file, lambda t: {**t, "odd.hada": torch.ones(1)})
    else:
        rewrite(file, lambda t: {k: v for k, v in t.items() if k != min(t)})
    with pytest.raises(
        MismatchError, match=r"is not both in the file and in what adapter_config\.json makes of a Llama"
    ):
        opened(tmp_path / "a", base)


def test_embeddings_trained_apart_from_a_tied_output_layer_are_named(family: Get, tmp_path: Path) -> None:
    base = family("gpt2").base
    model = transformers.GPT2LMHeadModel.from_pretrained(base)
    config = peft.LoraConfig(
        target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True, modules_to_save=["lm_head"], r=2
    )
    saved(config, model, tmp_path / "a")
    with pytest.raises(
        MismatchError, match=r"trains 'lm_head\.weight' apart from 'transformer\.wte\.weight', to which"
    ):
        opened(tmp_path / "a", base)
