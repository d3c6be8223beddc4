"""Small models of any class of transformers: a default configuration, shrunk key by key until it is tiny."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

KINDS: Mapping[str, str] = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "classifier": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
"""What is walked: kind -> transformers' own mapping of model types to classes."""

VOCABULARY, HIDDEN, HEADS, LAYERS, INNER, POSITIONS, IMAGE, PATCH = 96, 32, 4, 2, 48, 64, 64, 16
_MOST_PARAMETERS = 3_000_000

_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "vocab_size_per_layer_input", "src_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "word_embed_proj_dim",
                     "emb_dim", "n_embed", "pooler_hidden_size", "encoder_hidden_size",
                     "attention_hidden_size"), HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads",
                     "num_heads", "attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
                     "num_decoder_layers", "num_encoder_layers", "num_key_value_layers"), LAYERS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim", "encoder_ffn_dim",
                     "decoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size",
                     "shared_intermediate_size", "mlp_dim", "dense_intermediate_size", "intermediate_dim"), INNER),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions",
                     "max_sequence_length", "original_max_position_embeddings"), POSITIONS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size", "kv_channels", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("image_size", "input_size"), IMAGE),
    **dict.fromkeys(("qk_rope_head_dim", "state_size", "d_state", "mamba_d_state", "rotary_dim", "attention_window",
                     "num_buckets", "mamba_num_heads", "mamba_head_dim", "hidden_size_per_layer_input",
                     "attention_head_dim", "relative_attention_num_buckets", "linear_key_head_dim",
                     "linear_value_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "n_groups",
                     "mamba_n_groups", "bos_token_id", "moe_layer_end_index"), 1),
    **dict.fromkeys(("pad_token_id", "decoder_start_token_id", "moe_layer_start_index"), 0),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "sliding_window", "mamba_d_head", "chunk_size"), 16),
    **dict.fromkeys(("time_step_rank", "mamba_n_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("eos_token_id", "sep_token_id", "linear_num_key_heads"), 2),
    "patch_size": PATCH, "num_labels": 3, "kernel_size": 3, "lru_width": HIDDEN, "num_hash_buckets": 64,
}  # fmt: skip
"""What a key of a configuration becomes, where the class has it with a number."""


_HEAD_COUNTS: tuple[Mapping[str, int], ...] = (
    {},
    {"num_key_value_heads": HEADS},
    {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
)
"""What is tried one after the other: not every class takes grouped heads."""
_LAYER_LISTS = (
    "attention_types", "attn_layers", "block_types", "layer_types", "layers_block_type", "mlp_layer_types",
)  # fmt: skip
_WIDTHS = ("embed_dims", "encoder_hidden_dims", "hidden_sizes", "neck_hidden_sizes")


class CannotBeMadeError(Exception):
    """No tiny model of a class comes out of its default configuration."""


def classes(kind: str) -> dict[str, str]:
    """Model type -> class name, of one kind, as transformers lists them."""
    names = getattr(modeling_auto, KINDS[kind])
    return {key: value if isinstance(value, str) else value[0] for key, value in sorted(names.items())}


def small_model(class_name: str) -> PreTrainedModel:
    """A tiny model of a class, random and seeded, in float32.

    Raises:
        CannotBeMadeError: with transformers' own reason.
    """
    cls: Any = getattr(transformers, class_name, None)
    if cls is None or cls.config_class is None:
        raise CannotBeMadeError(f"transformers has no class {class_name} here")
    reasons = []
    for heads in (
        {},
        {"num_key_value_heads": HEADS},
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
    ):
        try:
            torch.manual_seed(0)
            config = small_config(cls.config_class, heads)
            with torch.device("meta"):
                count = sum(p.numel() for p in cls(config).parameters())
            if count > _MOST_PARAMETERS:
                raise CannotBeMadeError(f"{count:,} parameters are left after shrinking")
            torch.manual_seed(0)
            model: PreTrainedModel = cls(config).eval().float()
            return model
        except CannotBeMadeError as error:
            reasons.append(str(error))
        except Exception as error:  # noqa: BLE001  # whatever a class of transformers raises at a shrunk configuration is a reason
            reasons.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    raise CannotBeMadeError(reasons[0])


def small_config(cls: type[PretrainedConfig], heads: Mapping[str, int]) -> PretrainedConfig:
    """The default configuration with every size that is known by name made small, in sub-configurations too."""
    config = cls()
    _shrink(config, {**_SIZES, **heads})
    kept = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "transformers_version")}
    return type(config)(**kept)


def _shrink(config: PretrainedConfig, sizes: Mapping[str, int]) -> None:
    for key, value in list(vars(config).items()):
        number = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, PretrainedConfig):
            _shrink(value, sizes)
        elif key in sizes and (number or (value is None and key.endswith("_token_id"))):
            setattr(config, key, sizes[key])
        elif key == "image_size" and isinstance(value, list | tuple):
            setattr(config, key, [IMAGE] * len(value))
    layers = getattr(config, "num_hidden_layers", None)
    for key, value in list(vars(config).items()):
        if not isinstance(value, list | tuple):
            continue
        if key in _LAYER_LISTS and isinstance(layers, int):
            distinct = list(dict.fromkeys(value))  # a layer of each sort
            setattr(config, key, (distinct + list(value))[:layers])
        elif key in _WIDTHS:
            setattr(config, key, [16 * (index + 1) for index in range(len(value))])
        elif key == "depths":
            setattr(config, key, [1] * len(value))


def inputs_for(model: PreTrainedModel, kind: str, rows: int = 3) -> dict[str, Tensor]:
    """A padded batch of text (batch, seq), or images (batch, channel, height, width)."""
    generator = torch.Generator().manual_seed(1)
    if kind == "image":
        size = getattr(model.config, "image_size", IMAGE) or IMAGE
        height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
        channels = getattr(model.config, "num_channels", 3)
        return {"pixel_values": torch.randn(rows, channels, height, width, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):  # padding on the right
        mask[row, 9 - row :] = 0
        ids[row, 9 - row :] = 0
    if kind == "classifier":  # some read the state of the end token
        ids[torch.arange(rows), mask.sum(dim=1) - 1] = 2
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, 5), generator=generator)
    taken = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name in taken}
