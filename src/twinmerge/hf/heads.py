"""Answers by an expert's head: a model of its class without a backbone, over outputs computed elsewhere."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from twinmerge.errors import MismatchError
from twinmerge.hf.loading import model_class

_NO_TOKEN = -1
"""Stands for padding where a config names no id: no token of a text has it."""


def load_head(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """A whole model of the expert's class whose backbone holds no weights: only its head answers.

    Raises:
        MismatchError: if the tensors are not those of the class's head.
    """
    settings = AutoConfig.for_model(**config)
    cls = model_class(settings, "an expert")
    with torch.device("meta"):
        model: Any = cls(settings)
    prefix = cls.base_model_prefix
    names = set(model.state_dict())
    expected = {name for name in names if not name.startswith(f"{prefix}.")}
    if expected != set(tensors):
        odd = sorted(expected.symmetric_difference(tensors))
        raise MismatchError(
            f"the head of {cls.__name__} must hold {sorted(expected)}, found {sorted(tensors)} (differs in {odd[0]!r})"
        )
    setattr(model, prefix, nn.Identity())
    try:
        model.load_state_dict(dict(tensors), assign=True)
    except RuntimeError as error:
        raise MismatchError(
            f"the head of {cls.__name__} does not fit its config: {str(error).splitlines()[-1].strip()}"
        ) from error
    model.meta_names = names
    head: PreTrainedModel = model.eval()
    return head


class _Computed(nn.Module):
    """Stands where a head model expects its backbone, and hands over what the gated backbone has computed."""

    def __init__(self, outputs: ModelOutput) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *_: Any, **__: Any) -> ModelOutput:
        return self.outputs


def answered(head: Any, outputs: ModelOutput, inputs: Mapping[str, Any]) -> Tensor:
    """What a head makes of computed outputs; the head is not touched: calls run side by side.

    A head that looks for the last token of a row tells padding by its own id, whatever id the tokenizer pads with.

    Args:
        head: of `load_head`.
        outputs: of the backbone.
        inputs: what the backbone took.

    Returns:
        (batch, num_labels); (batch, seq, num_labels) for heads that label tokens; (batch, seq, 2), start and end, for
        those that answer questions.
    """
    shallow = copy.copy(head)
    shallow._modules = {**head._modules, type(head).base_model_prefix: _Computed(outputs)}
    mask = inputs.get("attention_mask")
    if mask is not None and "input_ids" in inputs and mask.shape == inputs["input_ids"].shape:
        padding = head.config.get_text_config().pad_token_id
        if padding is None:
            padding, shallow.config = _NO_TOKEN, copy.deepcopy(head.config)
            shallow.config.get_text_config().pad_token_id = padding
        inputs = {**inputs, "input_ids": inputs["input_ids"].masked_fill(mask == 0, padding)}
    logits: Tensor = said(shallow(**inputs))
    return logits


def said(outputs: Any) -> Any:
    """The logits of a model with a head, start and end side by side; the last hidden states of one without."""
    if "start_logits" in outputs:
        return torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=-1)
    found = [outputs[name] for name in ("logits", "last_hidden_state") if outputs.get(name) is not None]
    return found[0] if found else outputs[0]


def take(values: Any, rows: Sequence[int], batch: int) -> Any:
    """Rows of every tensor whose first axis is the batch; all of them are taken as they are."""
    if len(rows) == batch:
        return values
    picked = {k: v[list(rows)] if isinstance(v, Tensor) and len(v) == batch else v for k, v in values.items()}
    return type(values)(**picked) if isinstance(values, ModelOutput) else picked
