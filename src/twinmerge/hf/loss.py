"""Losses of answers, as transformers' own classes define them, over logits that are there already."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import LOSS_MAPPING

from twinmerge.errors import GateError
from twinmerge.hf.answers import EMBEDDING, ENTITIES, LABELS, VALUE, answers_of

_NO_LABEL = -100
"""What transformers leaves out of a loss."""


def loss_of_texts(model: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the tokens that have a label: each from the ones before it, or as a decoder is asked for it.

    Args:
        model: a language model of transformers.
        logits: (batch, seq, vocabulary).
        labels: (batch, seq), -100 where none is asked.
    """
    size = logits.shape[-1]
    if model.config.is_encoder_decoder:
        found = torch.nn.functional.cross_entropy(
            _wide(logits).reshape(-1, size), labels.reshape(-1), ignore_index=_NO_LABEL
        )
        return found
    of_causal: Any = LOSS_MAPPING["ForCausalLM"]
    shifted: Tensor = of_causal(logits=logits, labels=labels, vocab_size=size)
    return shifted


def loss_of(head: Any, logits: Tensor, label: Any) -> Tensor:
    """The loss of one row's answer, by its head's problem type.

    Args:
        head: a model of transformers.
        logits: (num_labels,), or (seq, num_labels) where every token has one.
        label: the row's, as the class takes it.

    Raises:
        GateError: if the class has no such loss.
    """
    kind = answers_of(head.config, "an expert", type(head).__name__)
    target = torch.as_tensor(label, device=logits.device)
    if kind is VALUE:
        return torch.nn.functional.mse_loss(_wide(logits).reshape(-1), target.to(_wide(logits)).reshape(-1))
    if kind is LABELS:
        return torch.nn.functional.binary_cross_entropy_with_logits(_wide(logits), target.to(_wide(logits)))
    if kind is EMBEDDING or (kind.spans and kind is not ENTITIES):
        raise GateError(f"labels: a {type(head).__name__} gives no loss here; ask for logits")
    flat = _wide(logits).reshape(-1, logits.shape[-1])
    return torch.nn.functional.cross_entropy(flat, target.reshape(-1), ignore_index=_NO_LABEL)


def _wide(values: Tensor) -> Tensor:
    """At least float32."""
    return values if values.dtype == torch.float64 else values.float()


def before(inputs: Mapping[str, Any], labels: Tensor) -> dict[str, Any]:
    """What a router may see of texts whose continuation is asked for: the tokens before each row's first label.

    Where a row's first token is one already, as when a model is asked about all it reads, nothing was given before,
    and the router sees the whole text. An encoder's input is the prompt, whatever the labels.
    """
    ids = inputs.get("input_ids")
    if ids is None or ids.shape != labels.shape:
        return {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    real = mask.bool() & (labels != _NO_LABEL)
    first = torch.where(real.any(dim=1), real.int().argmax(dim=1), ids.shape[1])
    begins = mask.int().argmax(dim=1)
    first = torch.where(first <= begins, ids.shape[1], first)
    seen = mask * (torch.arange(ids.shape[1], device=ids.device) < first[:, None])
    return {"input_ids": ids, "attention_mask": seen}


def with_decoder_inputs(model: Any, inputs: Mapping[str, Any], labels: Tensor) -> dict[str, Any]:
    """Inputs with what a decoder has written before each label, made of the labels as its class does."""
    if not model.config.is_encoder_decoder or "decoder_input_ids" in inputs:
        return dict(inputs)
    config = model.config.get_text_config()
    start, padding = config.decoder_start_token_id, config.pad_token_id
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return {**inputs, "decoder_input_ids": shifted.masked_fill(shifted == _NO_LABEL, padding)}
