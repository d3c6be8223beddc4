"""Answers by an expert's head: a model of its class without a backbone, over outputs computed elsewhere."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

from twinmerge.errors import GateError, MismatchError
from twinmerge.hf.classes import backbone_name
from twinmerge.hf.loading import model_class, model_from

_NO_TOKEN = -1
"""Stands for padding where a config names no id: no token of a text has it."""


@dataclass
class TwinOutput(ModelOutput):
    """What a twin says of a batch.

    Attributes:
        loss: a mean over rows, where labels were given.
        logits: one tensor where all experts share the output layer (causal LM); else a list of (num_labels,) tensors,
            one a row, each by the head of its row's expert; None for a plain encoder.
        gate: (batch, expert), what was mixed.
        expert: the expert of every row, whose head answered.
        probability: (batch, expert), calibrated: how likely each expert is the right one; None if the gate was given.
        fallback: (batch,) bool, rows unlike every expert's inputs; None if the gate was given.
        last_hidden_state: (batch, seq, hidden) of the gated backbone; None for a causal LM.
        pooler_output: (batch, hidden) of the gated backbone, where its class pools.
        past_key_values: of a language model that keeps them; a call that goes on from them needs the gate of this one.
    """

    loss: Tensor | None = None
    logits: Any = None
    gate: Tensor = None  # type: ignore[assignment]  # always given; ModelOutput allows one field without default
    expert: Any = None
    probability: Tensor | None = None
    fallback: Tensor | None = None
    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    past_key_values: Any = None


def load_head(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """A whole model of the expert's class whose backbone holds no weights: only its head answers.

    Args:
        config: the expert's.
        tensors: of its head, by the names of its class; a pooler that is the expert's own is among them.

    Raises:
        MismatchError: if the tensors are not those of the class's head.
    """
    settings = AutoConfig.for_model(**config)
    cls = model_class(settings, "an expert")
    with torch.device("meta"):
        model: Any = cls(settings)
    place, names = backbone_name(model), set(model.state_dict())
    if not place:
        raise MismatchError(f"an expert: a {cls.__name__} has no head apart from its backbone")
    computed = _Computed(None, model.get_submodule(place) if any(_is_pooler(n, place) for n in tensors) else None)
    expected = {name for name in names if not name.startswith(f"{place}.")}
    expected |= {f"{place}.{name}" for name in computed.state_dict()}
    if expected != set(tensors):
        odd = sorted(expected.symmetric_difference(tensors))
        raise MismatchError(
            f"the head of {cls.__name__} must hold {sorted(expected)}, found {sorted(tensors)} (differs in {odd[0]!r})"
        )
    setattr(model, place, computed)
    try:
        model.load_state_dict(dict(tensors), assign=True)
    except RuntimeError as error:
        raise MismatchError(
            f"the head of {cls.__name__} does not fit its config: {str(error).splitlines()[-1].strip()}"
        ) from error
    model.meta_names, model.place = names, place
    model.asks = _asks(model)
    head: PreTrainedModel = model.eval()
    return head


def encode(model: Any, inputs: Mapping[str, Any]) -> ModelOutput:
    """The outputs of a model without its head."""
    outputs: ModelOutput = model.base_model(**inputs, return_dict=True)
    return outputs


def called(model: Any, inputs: Mapping[str, Any]) -> ModelOutput:
    """The outputs of a whole model."""
    outputs: ModelOutput = model(**inputs)
    return outputs


def asked(head: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a head makes of inputs for its backbone: some add a decoder's ids, or which tokens see all others."""
    shallow = copy.copy(head)
    shallow._modules = {**head._modules, head.place: _Asked()}
    try:
        shallow(**inputs)
    except _AskedError as found:
        return {**inputs, **{name: value for name, value in found.given.items() if isinstance(value, Tensor)}}
    except (AttributeError, TypeError, ValueError) as error:
        raise MismatchError(
            f"an expert: a {type(head).__name__} asks more of its backbone than outputs, and makes no twin ({error})"
        ) from error
    raise MismatchError(f"an expert: a {type(head).__name__} answers without its backbone, and makes no twin")


class _AskedError(Exception):
    """Ends a head's forward at its backbone."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__()
        self.given = given


class _Asked(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _AskedError({**({"input_ids": args[0]} if args else {}), **kwargs})


def _asks(head: Any) -> frozenset[str]:
    """What a head gives its backbone otherwise than it was given."""
    if head.main_input_name != "input_ids":
        return frozenset()
    ids = torch.tensor([[5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = asked(head, inputs)
    return frozenset(k for k, v in found.items() if k not in inputs or not torch.equal(v, inputs[k]))


def _is_pooler(name: str, place: str) -> bool:
    return name.startswith(f"{place}.pooler.")


class _Computed(nn.Module):
    """Stands where a head model expects its backbone, and hands over what the gated backbone has computed."""

    def __init__(self, outputs: Any, pooled_by: Any) -> None:
        """`pooled_by` has the pooler that is the expert's own; None where there is none."""
        super().__init__()
        self.outputs = outputs
        self.pooler = None if pooled_by is None else pooled_by.pooler
        self.pooler_activation = getattr(pooled_by, "pooler_activation", None)
        if isinstance(self.pooler, nn.Linear) and self.pooler_activation is None:
            raise MismatchError(f"how {type(pooled_by).__name__} pools is not known; give a base that has the pooler")

    def forward(self, *_: Any, **__: Any) -> ModelOutput:
        if self.pooler is None:
            found: ModelOutput = self.outputs
            return found
        hidden = self.outputs[0]
        pooled = (
            self.pooler(hidden) if self.pooler_activation is None else self.pooler_activation(self.pooler(hidden[:, 0]))
        )
        rest = {name: self.outputs.get(name) for name in ("hidden_states", "attentions")}
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled, **rest)


def with_backbone(head: Any, body: Mapping[str, Tensor]) -> PreTrainedModel:
    """A plain model of the head's class, whose backbone has these weights, by the names that they have in it."""
    inside = {f"{head.place}.{name}": value for name, value in body.items()}
    state = {name: value for name, value in inside.items() if name in head.meta_names}
    own = {name: value.detach().clone() for name, value in head.state_dict().items()}
    return model_from(type(head), head.config, state | own)


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
    own = head._modules[head.place]
    shallow._modules = {**head._modules, head.place: _Computed(outputs, None if own.pooler is None else own)}
    mask = inputs.get("attention_mask")
    if mask is not None and "input_ids" in inputs and mask.shape == inputs["input_ids"].shape:
        padding = head.config.get_text_config().pad_token_id
        if padding is None:
            padding, shallow.config = _NO_TOKEN, copy.deepcopy(head.config)
            shallow.config.get_text_config().pad_token_id = padding
        inputs = {**inputs, "input_ids": inputs["input_ids"].masked_fill(mask == 0, padding)}
    try:
        logits: Tensor = said(shallow(**inputs))
    except ValueError as error:  # such as a row without the end token at which some classes read
        raise MismatchError(f"a {type(head).__name__} does not answer these rows: {error}") from error
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


def overlaid(outputs: ModelOutput, rows: Tensor, others: ModelOutput) -> ModelOutput:
    """Outputs with those of some rows (count,) taken from others; what is not one tensor of rows is left out."""
    count = len(outputs[0])
    found = {k: v for k, v in outputs.items() if isinstance(v, Tensor) and len(v) == count and k in others}
    return type(outputs)(**{name: value.index_copy(0, rows, others[name]) for name, value in found.items()})


def tokens_of(inputs: Mapping[str, Any]) -> int:
    """Of a batch of text; other inputs have as many as rows."""
    ids = inputs.get("input_ids")
    return ids.numel() if ids is not None else rows_of(inputs)


def rows_of(inputs: Mapping[str, Any]) -> int:
    """How many inputs a batch holds.

    Raises:
        GateError: if there is no tensor among them.
    """
    for value in inputs.values():
        if isinstance(value, Tensor):
            return len(value)
    raise GateError("inputs must hold at least one tensor, (batch, ...)")
