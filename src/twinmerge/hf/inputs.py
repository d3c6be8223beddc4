"""Turns rows of text into tensors: every row's tokens once, padded batch by batch."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from twinmerge.errors import ArtifactError
from twinmerge.files.rows import Row
from twinmerge.hf.answers import Span
from twinmerge.hf.batches import DEFAULTS, BatchLimits, batches
from twinmerge.hf.model import TwinModel
from twinmerge.routing.tokens import stack_ids
from twinmerge.twin.features import Layers

Encoded = dict[str, list[int]]
"""One row's `input_ids`, `attention_mask` and what else the tokenizer makes, (seq,) each."""


def encode(model: TwinModel, rows: Sequence[Row], *, room: int = 0) -> list[Encoded]:
    """Tokens of rows, cut at the model's limit; `text_pair` is used where a row has it.

    A row without any token becomes the token that a text begins with: no model reads nothing.

    Args:
        model: whose tokenizer is used.
        rows: texts.
        room: tokens left free below the limit, for a continuation.

    Raises:
        ArtifactError: if the model has no tokenizer, or the limit leaves nothing beside `room`.
    """
    if model.tokenizer is None:
        raise ArtifactError("this twin has no tokenizer, so it takes tensors only; add the base's tokenizer files")
    limit = length_limit(model) - room
    if limit < 1:
        raise ArtifactError(f"texts of {limit + room} tokens leave no room for {room} new ones; ask for fewer")
    encoded: list[Encoded] = [{}] * len(rows)
    for paired in (False, True):
        chosen = [index for index, row in enumerate(rows) if ("text_pair" in row) is paired]
        if not chosen:
            continue
        texts = [rows[index]["text"] for index in chosen]
        pairs = [rows[index]["text_pair"] for index in chosen] if paired else None
        found = model.tokenizer(texts, pairs, truncation=True, max_length=limit)
        for place, index in enumerate(chosen):
            encoded[index] = {name: values[place] for name, values in found.items()}
    return [one if one["input_ids"] else _start(model, one) for one in encoded]


def spans_of(model: TwinModel, row: Row) -> list[Span]:
    """Where every token of an encoded row comes from; a row without tokens, which got one, has none of its text."""
    found = model.tokenizer(row["text"], row.get("text_pair"), truncation=True, max_length=length_limit(model))[0]
    spans = zip(found.sequence_ids, found.offsets, strict=True)
    return [(sequence, start, end) for sequence, (start, end) in spans] or [(None, 0, 0)]


def pad(model: TwinModel, encoded: Sequence[Encoded], *, side: Literal["left", "right"] = "right") -> dict[str, Tensor]:
    """Encoded rows as one batch on the model's device, (batch, seq) each.

    Padding on the right leaves the positions of real tokens as they are, whatever the model; a generation needs it on
    the left.
    """
    filler = {"input_ids": model.tokenizer.pad_token_id or 0, "token_type_ids": model.tokenizer.pad_token_type_id}
    return {
        name: nn.utils.rnn.pad_sequence(
            [torch.tensor(one[name]) for one in encoded],
            batch_first=True,
            padding_value=filler.get(name, 0),
            padding_side=side,
        ).to(model.device)
        for name in encoded[0]
    }


def tokenize(model: TwinModel, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows as one padded batch on the model's device; see `encode` and `pad`."""
    return pad(model, encode(model, rows))


def tokenized_batches(
    model: TwinModel, rows: Sequence[Row], limits: BatchLimits = DEFAULTS.limits
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """All rows in batches of like length: (indices of rows, padded batch)."""
    encoded = encode(model, rows)
    for chosen in batches([len(one["input_ids"]) for one in encoded], limits):
        yield chosen, pad(model, [encoded[index] for index in chosen])


def features_of(
    model: TwinModel, rows: Sequence[Row], layers: Layers, limits: BatchLimits = DEFAULTS.limits
) -> Iterator[tuple[list[int], Tensor]]:
    """Router features of all rows, batch by batch: (indices of rows, (batch, feature))."""
    for chosen, inputs in tokenized_batches(model, rows, limits):
        yield chosen, model.features_as(layers, **inputs)


def ids_of(model: TwinModel, rows: Sequence[Row]) -> Tensor:
    """Token ids of all rows as the router sees them, (row, seq)."""
    return stack_ids([torch.tensor(one["input_ids"]) for one in encode(model, rows)])


def length_limit(model: TwinModel) -> int:
    """Tokens an input is cut at: the recipe's, or what tokenizer and positions allow."""
    limits = [
        model.max_length,
        model.tokenizer.model_max_length,
        getattr(model.backbone.config, "max_position_embeddings", None),
    ]
    return min(int(limit) for limit in limits if limit is not None)


def _start(model: TwinModel, empty: Encoded) -> Encoded:
    tokenizer = model.tokenizer
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    first = next((token for token in known if token is not None), 0)
    return {name: [{"input_ids": first, "attention_mask": 1}.get(name, 0)] for name in empty}
