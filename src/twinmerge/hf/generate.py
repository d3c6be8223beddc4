"""Writes texts under the settings of the expert that writes them."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.stopping_criteria import StopStringCriteria

from twinmerge.errors import GateError, InputError
from twinmerge.hf.features import reader

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings of generate that are idle where the likeliest token is taken."""
_BY_PADDED_LENGTH = ("repetition_penalty", "no_repeat_ngram_size", "min_length", "exponential_decay_length_penalty")


def end_ids(settings: GenerationConfig) -> tuple[int, ...]:
    """The tokens that end a text; none where only its length does."""
    ends = settings.eos_token_id
    return () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)


def stops_of(settings: GenerationConfig) -> tuple[str, ...]:
    """The strings that end a text."""
    stops = settings.stop_strings or ()
    return (stops,) if isinstance(stops, str) else tuple(stops)


def require_stops(tokenizer: Any, stops: Sequence[str], whose: str) -> None:
    """Refuse strings that transformers cannot find in the texts of a tokenizer.

    Raises:
        InputError: if the tokenizer's tokens have no text of their own, such as those of whole words.
    """
    try:
        StopStringCriteria(tokenizer, list(stops))
    except ValueError as fault:
        raise InputError(
            f"stop strings need a tokenizer whose tokens have a text of their own; that of {whose} has not ({fault}); "
            "leave the stop strings out, or use an end token"
        ) from fault


def sees_padding(settings: GenerationConfig) -> bool:
    """Whether what is written depends on how far a prompt was padded."""
    return any(getattr(settings, name, None) not in (None, 0, 1.0) for name in _BY_PADDED_LENGTH)


def writer(backbone: PreTrainedModel, settings: GenerationConfig | None, asked: Mapping[str, Any]) -> Any:
    """The same model under other settings, less those that what is asked makes idle; calls run side by side."""
    model: Any = copy.copy(backbone)
    model.generation_config = chosen = copy.deepcopy(settings or backbone.generation_config)
    idle = SAMPLING if asked.get("do_sample", chosen.do_sample) in (False, None) else ()
    for name in (*idle, *(("max_length",) if asked.get("max_new_tokens") else ())):
        setattr(chosen, name, None)
    return model


def said_otherwise(config: GenerationConfig, base: GenerationConfig) -> dict[str, Any]:
    """What a config says and the base's does not: as arguments of generate."""
    theirs, ours = config.to_dict(), base.to_dict()
    left_out = ("transformers_version", "_from_model_config")
    return {key: value for key, value in theirs.items() if key not in left_out and value != ours.get(key)}


def prompt(backbone: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Of generate's inputs those of one forward pass; positions count from the first real token, as generate does."""
    own = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
    if "attention_mask" in own and "position_ids" in inspect.signature(reader(backbone).forward).parameters:
        own["position_ids"] = (own["attention_mask"].long().cumsum(dim=1) - 1).clamp_min(0)
    return own


def keeps_cache(backbone: PreTrainedModel) -> bool:
    """Whether a model's cache is keys and values of every token, in every layer, which can be cut anywhere."""
    if backbone.config.is_encoder_decoder:
        return False
    layers = DynamicCache(config=backbone.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def goes_on(backbone: PreTrainedModel, settings: GenerationConfig | None) -> bool:
    """Whether texts under these settings may begin with another pass over their prompts: one text a prompt, cached."""
    chosen = settings or backbone.generation_config
    return (chosen.num_beams or 1) == 1 and (chosen.num_return_sequences or 1) == 1 and chosen.use_cache is not False


def begun(model: Any, outputs: Any, rows: Sequence[int]) -> Cache:
    """Let a `writer` begin with what a pass over prompts found, instead of a pass of its own.

    Args:
        model: of `writer`; its first call is answered from `outputs`.
        outputs: of the pass, the last token's logits among them, and its cache.
        rows: those that are written on.

    Returns:
        The cache to give to generate. It lacks the last tokens, of which generate asks the logits; the answer brings
        them back.
    """
    cache: Any = copy.deepcopy(outputs["past_key_values"])
    cache.batch_select_indices(torch.tensor(rows))
    whole = [(layer.keys, layer.values) for layer in cache.layers]
    cache.crop(-1)

    def forward(*_: Any, **__: Any) -> Any:
        del model.forward
        for layer, (keys, values) in zip(cache.layers, whole, strict=True):
            layer.keys, layer.values = keys, values
        return type(outputs)(logits=outputs["logits"][list(rows), -1:], past_key_values=cache)

    model.forward = forward
    found: Cache = cache
    return found


def join(parts: Sequence[tuple[Sequence[int], Any]], padding: int) -> Any:
    """Texts that were written apart, as one batch: each row's come where the row was.

    Args:
        parts: the rows of each pass, and what it wrote, (rows x as many, seq).
        padding: fills the shorter ones.
    """
    if len(parts) == 1:
        return parts[0][1]
    if not all(isinstance(written, Tensor) for _, written in parts):
        raise GateError("these rows are written under different settings of their experts; ask for each expert alone")
    width = max(written.shape[1] for _, written in parts)
    rows: dict[int, Tensor] = {}
    for members, written in parts:
        filled = torch.nn.functional.pad(written, (0, width - written.shape[1]), value=padding)
        rows |= dict(zip(members, filled.chunk(len(members)), strict=True))
    return torch.cat([rows[row] for row in sorted(rows)])
