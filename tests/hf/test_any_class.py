"""Classes whose layers read weights, see rows or hold parameters in unusual ways: each expert serves itself.

Every parameter and stored float buffer of every expert differs, at full rank.
"""

import copy
import pickle
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests import tiny
from twinmerge.hf.example import example_inputs
from twinmerge.hf.kinds import fallback_of, parameter_kinds
from twinmerge.hf.loading import skeleton
from twinmerge.hf.model import TwinModel
from twinmerge.tensors.low_rank import as_matrix, decompose
from twinmerge.tensors.parts import Dense, Part
from twinmerge.twin.features import Layers

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.2,
}
CLASSES: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "deberta": (
        "DebertaV2Model",
        "DebertaV2Config",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
         "norm_rel_ebd": "layer_norm"},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
         "decoder_start_token_id": 0, "initializer_factor": 2.0},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32,
         "init_std": 0.2, "pad_token_id": 0, "eos_token_id": 3, "forced_eos_token_id": None},
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**TEXT, "ffn_hidden_size": 32}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**TEXT, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4},
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2,
              "state_size": 4, "initializer_range": 0.2, "pad_token_id": 0}),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "opt": ("OPTForCausalLM", "OPTConfig", {**TEXT, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**TEXT, "num_key_value_heads": 1, "num_local_experts": 3,
                "experts_implementation": "eager"}),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {"text_config": {**TEXT, "num_key_value_heads": 1, "rope_parameters": {"rope_type": "default",
         "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
         "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4,
                           "mlp_ratio": 2},
         "image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63},
    ),
    "siglip-text": ("SiglipTextModel", "SiglipTextConfig", TEXT),
    "siglip-vision": ("SiglipVisionModel", "SiglipVisionConfig", VISION),
    "vit": ("ViTModel", "ViTConfig", VISION),
    "resnet": (
        "ResNetModel",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
}  # fmt: skip


def make(name: str) -> Any:
    model, config, settings = CLASSES[name]
    return tiny.seeded(getattr(transformers, model), getattr(transformers, config)(**settings))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """What an expert may change: parameters and stored float buffers."""
    stored = model.state_dict()
    buffers = {n: b for n, b in model.named_buffers() if n in stored and b.is_floating_point()}
    return {name: tensor.detach() for name, tensor in {**dict(model.named_parameters()), **buffers}.items()}


EXPERTS = 2
ROWS = 4
GATE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.3, 0.7], [1.0, 0.0]], dtype=torch.float64)
FAST = {"falcon", "gemma3", "neox", "siglip-text", "resnet"}
"""Classes without a single parameter that needs the fall-back."""


def part_of(difference: Tensor) -> Part:
    return decompose(as_matrix(difference))[0] if difference.ndim > 1 else Dense(difference)


@cache
def family(name: str) -> tuple[Any, list[Any], dict[str, dict[str, Part]]]:
    """The shared expert, the experts, and their exclusive parts; float64, so that what is wrong is not rounding."""
    base = make(name).double()
    shared, experts = tensors_of(base), []
    for _ in range(EXPERTS):
        expert = copy.deepcopy(base)
        for key, tensor in tensors_of(expert).items():
            tensor += 0.1 * (torch.rand_like(tensor) if "running_var" in key else torch.randn_like(tensor))
        experts.append(expert)
    parts = {
        f"e{index}": {key: part_of(tensor - shared[key]) for key, tensor in tensors_of(expert).items()}
        for index, expert in enumerate(experts)
    }
    return base, experts, parts


@cache
def twin(name: str) -> TwinModel:
    base, _, parts = family(name)
    return TwinModel(copy.deepcopy(base), parts)


def inputs_of(name: str) -> dict[str, Tensor]:
    x = example_inputs(family(name)[0], ROWS)
    if "attention_mask" in x:
        x["attention_mask"][3, -3:] = 0
    return x


def answers(outputs: Any, x: Mapping[str, Tensor]) -> list[Tensor]:
    """What a model says of each row's real tokens."""
    found = outputs.logits if outputs.get("logits") is not None else outputs.last_hidden_state
    mask = x.get("attention_mask")
    by_token = mask is not None and found.shape[:2] == mask.shape
    return [row[: int(mask[index].sum())] if by_token else row for index, row in enumerate(found)]


@torch.inference_mode()
def plain(model: Any, x: Mapping[str, Tensor]) -> list[Tensor]:
    return answers(model(**x), x)


def close(found: Tensor, wanted: Tensor) -> bool:
    """Gemma rounds the weights of its norms to float32, whatever it is given."""
    return torch.allclose(found, wanted, atol=1e-5, rtol=1e-5)


def of_row(x: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: values[row : row + 1] for name, values in x.items()}


@pytest.mark.parametrize("name", CLASSES)
def test_gate_of_one_expert_is_that_expert_and_any_gate_the_materialised_one(name: str) -> None:
    _, experts, _ = family(name)
    model, x = twin(name), inputs_of(name)
    found = answers(model(**x, gate=GATE), x)
    of_experts = [plain(expert, x) for expert in experts]
    assert not close(of_experts[0][0], of_experts[1][0])
    for row, expert in ((0, 0), (1, 1), (3, 0)):
        assert close(found[row], of_experts[expert][row])
    assert close(found[2], plain(model.materialize(GATE[2]), x)[2])


@pytest.mark.parametrize("name", CLASSES)
def test_row_alone_is_the_row_in_its_batch_and_a_gate_of_zeros_the_shared_expert(name: str) -> None:
    model, x = twin(name), inputs_of(name)
    together, shared = answers(model(**x, gate=GATE), x), plain(family(name)[0], x)
    zero = answers(model(**x, gate=torch.zeros(ROWS, EXPERTS, dtype=torch.float64)), x)
    for row in range(ROWS):
        alone = of_row(x, row)
        assert close(answers(model(**alone, gate=GATE[row : row + 1]), alone)[0], together[row])
        assert close(zero[row], shared[row])


@pytest.mark.parametrize("name", CLASSES)
def test_what_has_no_fast_form_is_named(name: str) -> None:
    ways = twin(name).paths()
    slow = [parameter for parameter, way in ways.items() if way == "fallback"]
    assert ways.keys() == tensors_of(family(name)[0]).keys()
    assert (not slow) == (name in FAST)
    assert len(slow) < len(ways) / 1.8


@pytest.mark.parametrize("name", ["mamba", "t5", "bart", "mixtral", "gemma3"])
def test_generation_under_several_gates_is_each_rows_own_models(name: str) -> None:
    model, x = twin(name), inputs_of(name)
    if name != "t5" and name != "bart":  # written on the right of the prompt
        x = {"input_ids": x["input_ids"]}
    else:
        x.pop("decoder_input_ids")
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    written = model.generate(**x, gate=GATE, **settings)
    for row in range(ROWS):
        alone = model.materialize(GATE[row]).generate(**of_row(x, row), **settings)[0]
        assert written[row, : len(alone)].tolist() == alone.tolist()
        assert not written[row, len(alone) :].any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_twin_with_fall_back_answers_the_same(copied: Callable[[TwinModel], TwinModel]) -> None:
    model, x = twin("deberta"), inputs_of("deberta")
    found = copied(model)
    wanted, again = answers(model(**x, gate=GATE), x), answers(found(**x, gate=GATE), x)
    assert all(torch.equal(first, second) for first, second in zip(wanted, again, strict=True))
    assert found.paths() == model.paths()


def test_features_under_gates_are_each_rows_own() -> None:
    """Below the last layer a pass ends early, in each group of rows."""
    model, x = twin("deberta"), inputs_of("deberta")
    for layers in (Layers((1,)), Layers("all")):
        found = model.features_as(layers, GATE, **x)
        for row in range(ROWS):
            alone = model.features_as(layers, GATE[row : row + 1], **of_row(x, row))
            assert torch.allclose(found[row], alone[0], atol=1e-6)  # features are float32
        assert not torch.allclose(found[0], model.features_as(layers, **x)[0], atol=1e-2)


@pytest.mark.parametrize("name", CLASSES)
def test_a_plan_without_weights_says_what_a_loaded_model_does(name: str, tmp_path: Path) -> None:
    base = family(name)[0]
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(tmp_path)
    model = skeleton(tmp_path)
    names = list(tensors_of(base))
    slow = [parameter for parameter, way in twin(name).paths().items() if way == "fallback"]
    assert sorted(fallback_of(model, names)) == sorted(slow)
    assert parameter_kinds(model) == parameter_kinds(base)
    assert {kind for tensor, kind in parameter_kinds(model).items() if tensor in names}.isdisjoint({"static"})
