"""Turns rows into tensors: texts and chats into tokens, once a row and padded batch by batch; images into pixels."""

import inspect
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from twinmerge.errors import ArtifactError, DataError
from twinmerge.files.rows import Row, require_image
from twinmerge.files.tables import DATA_URI
from twinmerge.hf.answers import Span
from twinmerge.hf.batches import DEFAULTS, BatchLimits, batches
from twinmerge.hf.images import open_image, prepare
from twinmerge.hf.model import TwinModel
from twinmerge.hf.positions import position_table

TEXTS = ("text", "prompt", "messages")
"""What of a row a model of texts reads; the first that it has."""
_NO_LIMIT = 10**6
"""Tokenizers without a limit say more."""
_ONE_AT_A_TIME = threading.Lock()
"""A tokenizer holds the length it cuts at: calls of several threads would take each other's."""

Encoded = dict[str, Any]
"""One row's `input_ids`, `attention_mask` and what else the tokenizer makes, (seq,) lists each; or of an image its
`pixel_values`, a tensor (channel, height, width)."""


def encode(model: TwinModel, rows: Sequence[Row], *, expert: str | None = None, room: int = 0) -> list[Encoded]:
    """Rows as a model reads them: tokens, cut at its limit, or pixels. `text_pair` is used where a row has it.

    A row's `text` counts, else its `prompt`, else its `messages`, which the tokenizer's chat template makes a text of.
    A row without any token becomes the token that a text begins with: no model reads nothing. What the tokenizer makes
    beside tokens is left out where the model does not take it.

    Args:
        model: whose tokenizer is used.
        rows: texts, chats or images, such as `require_readable` lets pass.
        expert: that reads them; None is the router, which reads with what is the base's.
        room: tokens left free below the limit, for a continuation.

    Raises:
        ArtifactError: if the model has no tokenizer, or the limit leaves nothing beside `room`.
        DataError: if an image cannot be read.
    """
    if model.reads_images:
        processor = model.own_of(expert).processor or model.processor
        if processor is None:
            raise ArtifactError("this twin has no image processor, so it takes tensors only; add the base's files")
        sources = [row["image"] for row in rows]
        return [{"pixel_values": one} for one in prepare(processor, sources, model.channels)]
    taken = _taken_by(model)
    encoded: list[Encoded] = [{}] * len(rows)
    kinds = [("text_pair" in row, is_chat(row)) for row in rows]
    for kind in dict.fromkeys(kinds):
        chosen = [index for index, own in enumerate(kinds) if own == kind]
        found = _tokens(model, [rows[index] for index in chosen], expert, room)
        for place, index in enumerate(chosen):
            encoded[index] = {name: values[place] for name, values in found.items() if name in taken}
    return [one if one["input_ids"] else _start(tokenizer_of(model, expert), one) for one in encoded]


def require_readable(model: TwinModel, row: Row, where: str) -> None:
    """Refuse a row that lacks what a model reads; of images, one that is not there, or that no header says to be one.

    Raises:
        DataError: saying what the row must hold.
    """
    if not model.reads_images:
        if not any(field in row for field in TEXTS):
            raise DataError(f"{where}: this twin reads texts; the row lacks 'text' (or 'prompt' or 'messages')")
        return
    if "image" not in row:
        raise DataError(f"{where}: this twin reads images; the row lacks 'image', a path or a data: URI")
    source = row["image"]
    require_image(source, where)
    if isinstance(source, str) and not source.startswith(DATA_URI) and not Path(source).is_file():
        raise DataError(f"{where}: 'image' {source!r} is no file; relative paths start from the folder of the rows")


def fault_of(model: TwinModel, row: Row) -> str | None:
    """Why a row's image cannot be read, None if it can; decodes it whole."""
    try:
        require_readable(model, row, "this row")
        open_image(row["image"], model.channels)
    except DataError as error:
        return str(error)
    return None


def text_of(tokenizer: Any, row: Row) -> str:
    """What a row says: its text, its prompt, or its chat up to the answer, as the tokenizer's template puts it.

    Without a template what was said stands line by line, which is enough to route by.
    """
    if not is_chat(row):
        return str(row["text"] if "text" in row else row["prompt"])
    messages = _asked(row)
    if tokenizer.chat_template is None:
        return "\n".join(message["content"] for message in messages)
    made: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return made


def is_chat(row: Row) -> bool:
    """Whether what a model reads of a row is a list of messages."""
    return "text" not in row and not isinstance(row.get("prompt", []), str)


def _asked(row: Row) -> list[dict[str, str]]:
    """The messages before the answer that is to be given, contents as strings."""
    messages = row.get("prompt") or row["messages"]
    while len(messages) > 1 and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    contents = [
        "".join(part["text"] for part in one["content"]) if isinstance(one["content"], list) else one["content"]
        for one in messages
    ]
    return [{"role": one["role"], "content": content} for one, content in zip(messages, contents, strict=True)]


def spans_of(model: TwinModel, row: Row, expert: str) -> list[Span]:
    """Where every token of an encoded row comes from; a row without tokens, which got one, has none of its text."""
    found = _tokens(model, [row], expert, 0)[0]
    spans = zip(found.sequence_ids, found.offsets, strict=True)
    return [(sequence, start, end) for sequence, (start, end) in spans] or [(None, 0, 0)]


def tokenizer_of(model: TwinModel, expert: str | None) -> Any:
    """The tokenizer with which an expert reads; the base's, unless it has its own."""
    return model.own_of(expert).tokenizer or model.tokenizer


def _tokens(model: TwinModel, rows: Sequence[Row], expert: str | None, room: int) -> Any:
    """What the tokenizer makes of rows that all have a second text, or none, and are all chats, or none."""
    if model.tokenizer is None:
        raise ArtifactError("this twin has no tokenizer, so it takes tensors only; add the base's tokenizer files")
    limit = length_limit(model)
    if limit is not None and limit <= room:
        raise ArtifactError(f"texts of {limit} tokens leave no room for {room} new ones; ask for fewer")
    cut: dict[str, Any] = {} if limit is None else {"truncation": True, "max_length": limit - room}
    own, tokenizer = model.own_of(expert), tokenizer_of(model, expert)
    if is_chat(rows[0]) and tokenizer.chat_template:
        cut["add_special_tokens"] = False  # the template has them
    first = [own.prompt + text_of(tokenizer, row) for row in rows]
    texts = [first, [row["text_pair"] for row in rows if "text_pair" in row]]
    texts = [[text.lower() for text in part] for part in texts] if own.lower_case else texts
    with _ONE_AT_A_TIME:
        return tokenizer(texts[0], texts[1] or None, **cut)


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

    Images share a batch with those of their size.

    Args:
        model: that reads them.
        encoded: rows.
        limits: of a batch.
        new: tokens that each row will grow by.
        alike: rows of one length share a batch and no others.
    """
    if encoded and "pixel_values" in encoded[0]:
        sizes: dict[Any, list[int]] = {}
        for index, one in enumerate(encoded):
            sizes.setdefault(one["pixel_values"].shape, []).append(index)
        return [own[at : at + limits.rows] for own in sizes.values() for at in range(0, len(own), limits.rows)]
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
    """Encoded rows as one batch on the model's device, (batch, seq) each; images as (batch, channel, height, width).

    Padding on the right leaves the positions of real tokens as they are, whatever the model; a generation needs it on
    the left.
    """
    if "pixel_values" in encoded[0]:
        pixels = torch.stack([one["pixel_values"] for one in encoded])
        return {"pixel_values": pixels.to(model.device, model.backbone.dtype)}
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
    """All rows, as an expert reads them, in batches of like length: (indices of rows, padded batch).

    Images are prepared a few at a time: a row of text is small, a picture is not.
    """
    step = limits.rows if model.reads_images else max(len(rows), 1)
    for start in range(0, len(rows), step):
        encoded = encode(model, rows[start : start + step], expert=expert)
        for chosen in batches_of(model, encoded, limits):
            yield [start + place for place in chosen], pad(model, [encoded[place] for place in chosen])


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
