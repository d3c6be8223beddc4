"""Makes inputs for any transformers model from its config: rows of different lengths, for a dry run."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_LENGTH = 7
"""Tokens of the longest row; no multiple of two or three, as rows are."""


def example_inputs(model: PreTrainedModel, rows: int) -> dict[str, Tensor]:
    """So many rows that a model can be run on; the second is one token shorter, the third two, padded on the right.

    Raises:
        ValueError: if it takes what no config describes.
    """
    config: Any = model.config
    taken = inspect.signature(model.forward).parameters
    main = model.main_input_name
    text = config.get_text_config()
    inputs: dict[str, Tensor] = {}
    if main == "input_ids":
        inputs |= _tokens(text, rows, "attention_mask" in taken)
        if "pixel_values" in taken and not hasattr(config, "image_token_id") and hasattr(config, "vision_config"):
            inputs["pixel_values"] = _pixels(config.vision_config, rows)
    elif main == "pixel_values":
        inputs["pixel_values"] = _pixels(config, rows)
    elif main == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 100)
        inputs["input_features"] = torch.randn(rows, getattr(config, "num_mel_bins", 80), frames)
    elif main == "input_values":
        inputs["input_values"] = torch.randn(rows, 4000)
    else:
        raise ValueError(f"no inputs are known for {main}")
    if config.is_encoder_decoder and "decoder_input_ids" in taken:
        inputs["decoder_input_ids"] = _tokens(text, rows, masked=False)["input_ids"]
    dtype, device = model.dtype, model.device
    return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}


def _tokens(config: Any, rows: int, masked: bool) -> dict[str, Tensor]:
    """Ids of ordinary tokens: not the first few, which are special ones in most vocabularies."""
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "eos", "bos")}
    ordinary = [i for i in range(min(config.vocab_size, 50)) if i not in special][5:] or [0]
    places = torch.arange(rows * _LENGTH).view(rows, _LENGTH) % len(ordinary)
    ids = torch.tensor(ordinary)[places]
    inputs = {"input_ids": ids}
    if masked:
        lengths = torch.tensor([_LENGTH - row for row in range(rows)])
        inputs["attention_mask"] = (torch.arange(_LENGTH) < lengths[:, None]).long()
    return inputs


def _pixels(config: Any, rows: int) -> Tensor:
    size = getattr(config, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return torch.randn(rows, getattr(config, "num_channels", 3), height, width)
