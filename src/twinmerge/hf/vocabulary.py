"""Lets an expert read and write tokens that it alone has, by the ids of the twin's tables."""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from twinmerge.errors import MismatchError
from twinmerge.models.vocabulary import Added, Vocabulary
from twinmerge.runtime.gate import GateSlot

_WITH_IDS = (
    *("bad_words_ids", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id", "eos_token_id"),
    *("force_words_ids", "forced_bos_token_id", "forced_eos_token_id", "pad_token_id", "sequence_bias"),
    "suppress_tokens",
)
"""Settings of generate that hold tokens, alone or in lists."""


def vocabulary_tables(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the parameters that have a row for every token: of the input and the output embeddings."""
    layers: Any = model
    try:
        embedding = layers.get_input_embeddings()
    except NotImplementedError:  # what transformers raises of a class that it finds no embeddings in, as of images
        return ()
    if not isinstance(embedding, nn.Embedding):
        return ()
    output = layers.get_output_embeddings()
    found = [*embedding.parameters(recurse=False), *(output.parameters(recurse=False) if output is not None else ())]
    own = {id(p) for p in found if len(p) == embedding.num_embeddings}
    return tuple(name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own)


def renumbered(tokenizer: Any, added: Added | None) -> Any:
    """A tokenizer that gives and takes the twin's ids for an expert's own tokens.

    Raises:
        MismatchError: if it is none of the tokenizers library.
    """
    if tokenizer is None or added is None:
        return tokenizer
    cls = type(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise MismatchError(f"a {cls.__name__} cannot be given other ids; save a fast tokenizer with tokenizer.json")
    made = copy.copy(tokenizer)
    made.__class__ = type(cls.__name__, (_Renumbered, cls), {})
    made.plain, made.added = tokenizer, added
    made.to_twin, made.to_own = added.to_twin, {twin: own for own, twin in added.to_twin.items()}
    return made


class _Renumbered(PreTrainedTokenizerFast):
    """Goes before the class of a tokenizer whose ids are others outside; no number is an id of both kinds."""

    plain: Any
    added: Added
    to_twin: Mapping[int, int]
    to_own: Mapping[int, int]

    def _convert_encoding(self, *args: Any, **asked: Any) -> Any:
        found, encodings = super()._convert_encoding(*args, **asked)
        found["input_ids"] = [[self.to_twin.get(one, one) for one in ids] for ids in found["input_ids"]]
        return found, encodings

    def _decode(self, token_ids: int | list[int], *args: Any, **asked: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return super()._decode([self.to_own.get(one, one) for one in ids], *args, **asked)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """See transformers."""
        found = super().convert_tokens_to_ids(tokens)
        if isinstance(found, list):
            return [self.to_twin.get(one, one) for one in found]
        return self.to_twin.get(found, found)

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """See transformers."""
        if isinstance(ids, int):
            return super().convert_ids_to_tokens(self.to_own.get(ids, ids))
        skipped = {*self.all_special_ids} if skip_special_tokens else set()
        own = [self.to_own.get(one, one) for one in map(int, ids) if one not in skipped]
        return super().convert_ids_to_tokens(own)

    def get_vocab(self) -> dict[str, int]:
        """See transformers."""
        found: dict[str, int] = super().get_vocab()
        return {token: self.to_twin.get(one, one) for token, one in found.items()}

    def __reduce__(self) -> Any:
        return renumbered, (self.plain, self.added)


def with_twin_ids(settings: GenerationConfig | None, added: Added | None) -> GenerationConfig | None:
    """An expert's settings with the twin's ids of its own tokens."""
    if settings is None or added is None:
        return settings
    made = copy.deepcopy(settings)
    for name in _WITH_IDS:
        setattr(made, name, _mapped(getattr(made, name, None), added.to_twin))
    return made


def _mapped(value: Any, ids: Mapping[int, int]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_mapped(one, ids) for one in value)
    if isinstance(value, dict):
        return {_mapped(key, ids): bias for key, bias in value.items()}
    return ids.get(value, value) if isinstance(value, int) else value


def listen(backbone: Any, vocabulary: Vocabulary, experts: tuple[str, ...], slot: GateSlot) -> None:
    """Let no row of logits name a token that the expert with its gate's largest weight does not have."""
    output = backbone.get_output_embeddings()
    if output is None:
        return
    silent = torch.ones(len(experts) + 1, vocabulary.size, dtype=torch.bool)  # the last row is the shared expert's
    silent[-1, : vocabulary.base] = False
    for place, name in enumerate(experts):
        silent[place, vocabulary.own_rows(name)] = False
    output.register_forward_hook(partial(_silenced, slot, silent))


def _silenced(slot: GateSlot, silent: Tensor, layer: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
    chosen = torch.tensor([-1])
    if slot.context is not None:
        gate = slot.context.gate
        chosen = torch.where(gate.any(dim=1), gate.argmax(dim=1), -1).cpu()
    rows = silent[chosen].to(logits.device)
    by_gate = logits.reshape(len(rows), -1, logits.shape[-1])
    return by_gate.masked_fill(rows[:, None], -torch.inf).view_as(logits)


def own_state(
    state: Mapping[str, Tensor], tables: tuple[str, ...], vocabulary: Vocabulary | None, expert: str
) -> dict[str, Tensor]:
    """Values by name with an expert's own tables: its ids, not the twin's."""
    rows = None if vocabulary is None else vocabulary.own_rows(expert)
    return {n: v[rows.to(v.device)] if rows is not None and n in tables else v for n, v in state.items()}


def with_tokens(config: Any, count: int) -> Any:
    """A copy of a config for so many tokens."""
    made = copy.deepcopy(config)
    made.get_text_config().vocab_size = count
    return made
