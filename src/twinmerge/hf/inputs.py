"""Turns rows of text into tensors: every row's tokens once, padded batch by batch."""

import inspect
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from twinmerge.errors import ArtifactError
from twinmerge.files.rows import Row
from twinmerge.hf.answers import Span
from twinmerge.hf.batches import DEFAULTS, BatchLimits, batches
from twinmerge.hf.model import TwinModel
from twinmerge.hf.positions import position_table

_NO_LIMIT = 10**6
"""Tokenizers without a limit say more."""
_ONE_AT_A_TIME = threading.Lock()
"""A tokenizer holds the length it cuts at: calls of several threads would take each other's."""

Encoded = dict[str, list[int]]
"""One row's `input_ids`, `attention_mask` and what else the tokenizer makes, (seq,) each."""


def encode(model: TwinModel, rows: Sequence[Row], *, expert: str | None = None, room: int = 0) -> list[Encoded]:
    """Tokens of rows, cut at the model's limit; `text_pair` is used where a row has it.

    A row without any token becomes the token that a text begins with: no model reads nothing. What the tokenizer makes
    beside tokens is left out where the model does not take it.

    Args:
        model: whose tokenizer is used.
        rows: texts.
        expert: that reads them; None is the router, which reads with the base's tokenizer.
        room: tokens left free below the limit, for a continuation.

    Raises:
        ArtifactError: if the model has no tokenizer, or the limit leaves nothing beside `room`.
    """
    taken = _taken_by(model)
    encoded: list[Encoded] = [{}] * len(rows)
    for paired in (False, True):
        chosen = [index for index, row in enumerate(rows) if ("text_pair" in row) is paired]
        if not chosen:
            continue
        found = _tokens(model, [rows[index] for index in chosen], expert, room)
        for place, index in enumerate(chosen):
            encoded[index] = {name: values[place] for name, values in found.items() if name in taken}
    return [one if one["input_ids"] else _start(tokenizer_of(model, expert), one) for one in encoded]


def spans_of(model: TwinModel, row: Row, expert: str) -> list[Span]:
    """Where every token of an encoded row comes from; a row without tokens, which got one, has none of its text."""
    found = _tokens(model, [row], expert, 0)[0]
    spans = zip(found.sequence_ids, found.offsets, strict=True)
    return [(sequence, start, end) for sequence, (start, end) in spans] or [(None, 0, 0)]


def tokenizer_of(model: TwinModel, expert: str | None) -> Any:
    """The tokenizer with which an expert reads; the base's, unless it has its own."""
    return model.own_of(expert).tokenizer or model.tokenizer


def _tokens(model: TwinModel, rows: Sequence[Row], expert: str | None, room: int) -> Any:
    """What the tokenizer makes of rows that all have a second text, or none."""
    if model.tokenizer is None:
        raise ArtifactError("this twin has no tokenizer, so it takes tensors only; add the base's tokenizer files")
    limit = length_limit(model)
    if limit is not None and limit <= room:
        raise ArtifactError(f"texts of {limit} tokens leave no room for {room} new ones; ask for fewer")
    cut: dict[str, Any] = {} if limit is None else {"truncation": True, "max_length": limit - room}
    own = model.own_of(expert)
    texts = [[own.prompt + row["text"] for row in rows], [row["text_pair"] for row in rows if "text_pair" in row]]
    texts = [[text.lower() for text in part] for part in texts] if own.lower_case else texts
    with _ONE_AT_A_TIME:
        return tokenizer_of(model, expert)(texts[0], texts[1] or None, **cut)


def _taken_by(model: TwinModel) -> set[str]:
    """What of a tokenizer's output a model reads."""
    names = {"input_ids", *inspect.signature(model.backbone.base_model.forward).parameters}
    if len(names) < 4 and "kwargs" in names:  # a wrapper, which hands on what it is given
        names = {"input_ids", *inspect.signature(model.backbone.forward).parameters}
    if getattr(model.backbone.config, "type_vocab_size", 2) < 2:
        names.discard("token_type_ids")  # there is one type, which stands for all
    return names


def batches_of(
    model: TwinModel, encoded: Sequence[Encoded], limits: BatchLimits, *, new: int = 0, alike: bool = False
) -> list[list[int]]:
    """Indices of encoded rows in batches of like length, or of one length where padding could not be masked.

    Args:
        model: that reads them.
        encoded: rows.
        limits: of a batch.
        new: tokens that each row will grow by.
        alike: rows of one length share a batch and no others.
    """
    lengths = [len(one["input_ids"]) + new for one in encoded]
    if not alike and "attention_mask" in _taken_by(model):
        return batches(lengths, limits)
    of_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        of_length.setdefault(length, []).append(index)
    return [
        [own[index] for index in chosen]
        for length, own in sorted(of_length.items(), reverse=True)
        for chosen in batches([length] * len(own), limits)
    ]


def pad(model: TwinModel, encoded: Sequence[Encoded], *, side: Literal["left", "right"] = "right") -> dict[str, Tensor]:
    """Encoded rows as one batch on the model's device, (batch, seq) each.

    Padding on the right leaves the positions of real tokens as they are, whatever the model; a generation needs it on
    the left.
    """
    filler = {"input_ids": padding_id(model), "token_type_ids": model.tokenizer.pad_token_type_id}
    return {
        name: nn.utils.rnn.pad_sequence(
            [torch.tensor(one[name]) for one in encoded],
            batch_first=True,
            padding_value=filler.get(name, 0),
            padding_side=side,
        ).to(model.device)
        for name in encoded[0]
    }


def padding_id(model: TwinModel) -> int:
    """What fills a batch: the id by which the model itself knows padding, else the tokenizer's, else any."""
    config = model.backbone.config.get_text_config()
    of_model = getattr(config, "pad_token_id", None)  # which not every class knows
    known = (of_model, model.tokenizer.pad_token_id, model.tokenizer.unk_token_id)
    return next((token for token in known if token is not None and 0 <= token < config.vocab_size), 0)


def tokenize(model: TwinModel, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows as one padded batch on the model's device; see `encode` and `pad`."""
    return pad(model, encode(model, rows))


def tokenized_batches(
    model: TwinModel, rows: Sequence[Row], limits: BatchLimits = DEFAULTS.limits, expert: str | None = None
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """All rows, as an expert reads them, in batches of like length: (indices of rows, padded batch)."""
    encoded = encode(model, rows, expert=expert)
    for chosen in batches_of(model, encoded, limits):
        yield chosen, pad(model, [encoded[index] for index in chosen])


def length_limit(model: TwinModel) -> int | None:
    """Tokens a twin's inputs are cut at; see `limit_of`."""
    return limit_of(model.backbone, model.tokenizer, model.max_length)


def limit_of(backbone: PreTrainedModel, tokenizer: Any, asked: int | None) -> int | None:
    """Tokens an input is cut at: what was asked, else what tokenizer and positions allow; None if nothing says."""
    trained = getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
    said = [asked] if asked is not None else [tokenizer.model_max_length, trained]
    limits = [int(limit) for limit in (*said, position_table(backbone)) if limit is not None and 0 < limit < _NO_LIMIT]
    return min(limits, default=None)


def _start(tokenizer: Any, empty: Encoded) -> Encoded:
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    first = next((token for token in known if token is not None), 0)
    return {name: [{"input_ids": first, "attention_mask": 1}.get(name, 0)] for name in empty}
