"""Knows an expert's head: a model of its class without a backbone, over outputs computed elsewhere."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from twinmerge.errors import MismatchError
from twinmerge.hf.loading import model_class


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


def with_outputs(head: Any, outputs: ModelOutput) -> nn.Module:
    """A shallow copy of a head model over computed outputs; the original is not touched: calls run side by side."""
    shallow = copy.copy(head)
    shallow._modules = {**head._modules, type(head).base_model_prefix: _Computed(outputs)}
    model: nn.Module = shallow
    return model


def take(values: Any, rows: Sequence[int], batch: int) -> Any:
    """Rows of every tensor whose first axis is the batch; all of them are taken as they are."""
    if len(rows) == batch:
        return values
    picked = {k: v[list(rows)] if isinstance(v, Tensor) and len(v) == batch else v for k, v in values.items()}
    return type(values)(**picked) if isinstance(values, ModelOutput) else picked
