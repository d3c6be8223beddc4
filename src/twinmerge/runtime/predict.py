"""Knows how rows of text become tensors, in batches of like length, and how answers return in input order."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import ArtifactError
from twinmerge.runtime.model import TwinModel
from twinmerge.runtime.rows import Row
from twinmerge.twin.ngrams import PADDING, stack_ids, token_ids

WINDOW_BATCHES = 32


def tokenize(model: TwinModel, rows: Sequence[Row]) -> dict[str, Tensor]:
    """One padded batch on the model's device; `text_pair` is used where a row has it.

    Raises:
        ArtifactError: if the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise ArtifactError("this twin has no tokenizer, so it takes tensors only; add the base's tokenizer files")
    texts = [row["text"] for row in rows]
    pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
    encoded = model.tokenizer(
        texts, pairs, padding=True, truncation=True, max_length=length_limit(model), return_tensors="pt"
    )
    return {name: tensor.to(model.device) for name, tensor in encoded.items()}


def length_limit(model: TwinModel) -> int:
    """Tokens an input is cut at: the recipe's, or what tokenizer and positions allow."""
    limits = [
        model.max_length,
        model.tokenizer.model_max_length,
        getattr(model.backbone.config, "max_position_embeddings", None),
    ]
    return min(int(limit) for limit in limits if limit is not None)


def batches(rows: Sequence[Row], batch_size: int) -> list[list[int]]:
    """Indices of rows in batches of like length, longest first."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]["text"]) - len(rows[i].get("text_pair", "")), i))
    with_pair = [i for i in order if "text_pair" in rows[i]]
    without = [i for i in order if "text_pair" not in rows[i]]
    return [part[s : s + batch_size] for part in (with_pair, without) for s in range(0, len(part), batch_size)]


@torch.inference_mode()
def features_of(
    model: TwinModel, rows: Sequence[Row], spec: str, batch_size: int = 32
) -> Iterator[tuple[list[int], Tensor]]:
    """Router features of all rows, batch by batch: (indices of rows, (batch, feature))."""
    for chosen in batches(rows, batch_size):
        yield chosen, model.features_as(spec, **tokenize(model, [rows[i] for i in chosen]))


def ids_of(model: TwinModel, rows: Sequence[Row], batch_size: int = 256) -> Tensor:
    """Token ids of all rows as the router sees them, (row, seq)."""
    ids: list[Tensor] = [torch.empty(0)] * len(rows)
    for chosen in batches(rows, batch_size):
        for index, found in zip(chosen, token_ids(tokenize(model, [rows[i] for i in chosen])), strict=True):
            ids[index] = found[found != PADDING].cpu()
    return stack_ids(ids)


def predict(
    model: TwinModel, rows: Iterable[Row], *, expert: str | None = None, batch_size: int = 32
) -> Iterator[dict[str, Any]]:
    """Answer rows in input order, in bounded memory.

    Args:
        model: the twin.
        rows: {"text": ...} or {"text": ..., "text_pair": ...}; other fields are handed through.
        expert: use this expert alone, not the router.
        batch_size: rows a batch.

    Yields:
        {"expert", "gate", "fallback", "label", "score", ...the row's other fields}; for a twin without heads
        label and score are left out.
    """
    stream = iter(rows)
    while window := list(islice(stream, WINDOW_BATCHES * batch_size)):
        answers: list[dict[str, Any]] = [{}] * len(window)
        for chosen in batches(window, batch_size):
            picked = [window[i] for i in chosen]
            for index, answer in zip(chosen, _answer(model, picked, expert), strict=True):
                answers[index] = {**answer, **{k: v for k, v in window[index].items() if k not in answer}}
        yield from answers


def _answer(model: TwinModel, rows: Sequence[Row], expert: str | None) -> Iterator[dict[str, Any]]:
    out = model(**tokenize(model, rows), expert=expert)
    for index, name in enumerate(out.expert):
        gate = {e: round(w, 6) for e, w in zip(model.expert_names, out.gate[index].tolist(), strict=True)}
        answer: dict[str, Any] = {"expert": name, "gate": gate}
        answer["fallback"] = bool(out.fallback[index]) if out.fallback is not None else False
        if model.heads:
            probabilities = out.logits[index].float().softmax(dim=-1)
            score, label = probabilities.max(dim=-1)
            head: Any = model.heads[name]
            answer |= {"label": head.config.id2label[int(label)], "score": round(float(score), 6)}
        yield answer
