"""Answers a window of rows: who reads and writes each, in which batch, and what the answer says of its way."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import DataError
from twinmerge.files.rows import Row
from twinmerge.hf.answers import CONTINUATION, Answer, Answers, Reading, answers_of, require_texts
from twinmerge.hf.batches import PredictSettings, Writing
from twinmerge.hf.generate import end_ids, sees_padding, stops_of
from twinmerge.hf.heads import TwinOutput
from twinmerge.hf.inputs import Encoded, batches_of, encode, is_chat, pad, padding_id, spans_of, tokenizer_of
from twinmerge.hf.model import Mode, TwinModel
from twinmerge.hf.positions import reads_position_table
from twinmerge.runtime.precision import Running


def answers_by_expert(model: TwinModel) -> dict[str, Answers]:
    """How each expert answers: by its head, or by the output layer that all share."""
    if model.heads:
        heads: Mapping[str, Any] = dict(model.heads.items())
        return {n: answers_of(h.config, f"expert {n!r}", type(h).__name__) for n, h in heads.items()}
    shared = answers_of(model.backbone.config, "the shared expert", type(model.backbone).__name__)
    return dict.fromkeys(model.expert_names, shared)


@dataclass(frozen=True)
class _Group:
    """Rows of a window that are read alike, by whom, and where they go; empty where the pass that answers routes."""

    rows: Sequence[int]
    reader: str | None = None
    experts: Sequence[str] = ()
    gate: Tensor = field(default_factory=lambda: torch.empty(0))
    fallback: Sequence[bool] = ()
    probability: Tensor | None = None
    """(row, expert) of the router, None where it was not asked."""

    def take(self, chosen: Sequence[int]) -> "_Group":
        """Some of them."""
        rows = [self.rows[place] for place in chosen]
        if not self.experts:
            return _Group(rows, self.reader)
        experts, fallback = [self.experts[place] for place in chosen], [self.fallback[place] for place in chosen]
        probability = None if self.probability is None else self.probability[list(chosen)]
        return _Group(rows, self.reader, experts, self.gate[list(chosen)], fallback, probability)


def answer_rows(
    model: TwinModel,
    rows: Sequence[Row],
    settings: PredictSettings,
    kinds: Mapping[str, Answers],
    numbers: Sequence[int],
) -> Iterator[tuple[list[int], list[Answer]]]:
    """Answers of a window, whose rows have these numbers for a user, batch by batch: (indices of rows, answers)."""
    generates = CONTINUATION in kinds.values()
    new = settings.max_new_tokens if generates else 0
    # one gate for all: weights merged once, if they may be kept
    kept = settings.owner is not None and model.merged.set_bytes <= model.merged.limit_bytes
    mode: Mode = "merge" if kept else "auto"
    device = model.device.type
    context = Running.of(model.backbone.dtype, settings.precision, device).context
    with context(device):
        groups = _groups(model, rows, settings, generates) if rows else []
    for group in groups:
        _require_template(model, rows, group, numbers)
        encoded = encode(model, [rows[index] for index in group.rows], expert=group.reader, room=new)
        alike = generates and (sees_padding(_generation(model, group.reader)) or reads_position_table(model.backbone))
        for chosen in batches_of(model, encoded, settings.limits, new=new, alike=alike):
            part, picked = group.take(chosen), [encoded[place] for place in chosen]
            with context(device), _seeded(settings.writing, [numbers[index] for index in part.rows], model.device):
                answers, outputs = (_continued if generates else _labelled)(model, picked, part, settings, mode)
            for index, one, answer, output in zip(part.rows, picked, answers, outputs, strict=True):
                name = answer["expert"]
                require_texts(kinds[name], rows[index], f"row {numbers[index]}, answered by expert {name!r}")
                answer |= kinds[name].read(_reading(model, kinds[name], name, rows[index], one, output, settings))
            yield list(part.rows), answers


def _groups(model: TwinModel, rows: Sequence[Row], settings: PredictSettings, generates: bool) -> list[_Group]:
    """The rows of a window by how they are read and written; routed before, where that differs by expert."""
    every = range(len(rows))
    if settings.owner is not None:
        names = [settings.owner] * len(rows)
        gate = model.one_hot(names)
        if settings.gate is not None:
            weights = [settings.gate.get(name, 0.0) for name in model.expert_names]
            gate = torch.tensor([weights], device=model.device).expand(len(rows), -1)
        return [_Group(every, settings.owner, names, gate, [False] * len(rows))]
    alike = not any(own.reads or (generates and own.generation) for own in model.own.values())
    if alike and (not generates or model.routes_as_it_writes):
        return [_Group(every)]
    encoded = encode(model, rows)
    gate = torch.zeros(len(rows), len(model.expert_names), device=model.device)
    probability = torch.zeros_like(gate)
    names, fallback = [""] * len(rows), [False] * len(rows)
    for chosen in batches_of(model, encoded, settings.limits):
        routing = model.routing(**pad(model, [encoded[index] for index in chosen]))
        gate[chosen], probability[chosen] = routing.gate.to(gate), routing.probability.to(gate)
        for index, expert, alone in zip(chosen, routing.expert.tolist(), routing.fallback.tolist(), strict=True):
            names[index], fallback[index] = model.expert_names[expert], alone
    whole, members = _Group(every, None, names, gate, fallback, probability), dict[str | None, list[int]]()
    for index, name in enumerate(names):
        own = model.own_of(name)
        members.setdefault(name if own.reads or own.generation else None, []).append(index)
    return [replace(whole.take(own), reader=name) for name, own in members.items()]


def _require_template(model: TwinModel, rows: Sequence[Row], group: _Group, numbers: Sequence[int]) -> None:
    """Refuse a chat that no template of its reader makes a text of."""
    if model.reads_images or tokenizer_of(model, group.reader).chat_template:
        return
    chats = [index for index in group.rows if is_chat(rows[index])]
    if chats:
        whose = "the base" if group.reader is None else f"expert {group.reader!r}"
        raise DataError(
            f"row {numbers[chats[0]]}: messages need a chat template, which the tokenizer of {whose} has not; "
            "give the row as 'text'"
        )


def _generation(model: TwinModel, expert: str | None) -> Any:
    return model.own_of(expert).generation or model.backbone.generation_config


def _reading(
    model: TwinModel,
    kind: Answers,
    expert: str,
    row: Row,
    encoded: Encoded,
    output: Tensor,
    asked: PredictSettings,
) -> Reading:
    owner: Any = model.heads[expert] if model.heads else model.backbone
    if kind is CONTINUATION:
        decode = partial(tokenizer_of(model, expert).decode, skip_special_tokens=True)
        settings = _generation(model, expert)
        ends, stops = end_ids(settings), stops_of(settings)
        return Reading(row, output, owner.config, decode=decode, ends=ends, stops=stops, ends_before=asked.writing.stop)
    real = output[: len(encoded["input_ids"])] if kind.by_token and "input_ids" in encoded else output
    spans = spans_of(model, row, expert) if kind.spans else ()
    return Reading(row, real.float(), owner.config, spans, model.own_of(expert).pool)


def _labelled(
    model: TwinModel, encoded: Sequence[Encoded], part: _Group, settings: PredictSettings, mode: Mode
) -> tuple[list[Answer], list[Tensor]]:
    """What heads say; where there are none, the backbone's last hidden states."""
    given: dict[str, Any] = {"gate": part.gate, "expert": part.experts} if part.experts else {}
    out = model(**pad(model, encoded), mode=mode, **given)
    outputs = out.logits if model.heads else _embedded(model, out)
    if not part.experts:
        part = replace(
            part, experts=out.expert, gate=out.gate, fallback=out.fallback.tolist(), probability=out.probability
        )
    return _routed(model, part, settings), list(outputs)


def _embedded(model: TwinModel, out: TwinOutput) -> Tensor:
    """(batch, seq, hidden) that an embedding is made of; of images what the class pools, else all their positions."""
    states: Any = out.last_hidden_state
    if model.reads_images and out.pooler_output is not None:
        states = out.pooler_output.flatten(1)[:, None]
    found: Tensor = states.flatten(2).transpose(1, 2) if states.ndim == 4 else states
    return found


def _continued(
    model: TwinModel, encoded: Sequence[Encoded], part: _Group, settings: PredictSettings, mode: Mode
) -> tuple[list[Answer], list[Tensor]]:
    """Continuations, written with padding on the left; a decoder of its own begins anew."""
    inputs: dict[str, Any] = pad(model, encoded, side="right" if model.backbone.config.is_encoder_decoder else "left")
    given: dict[str, Any] = {"gate": part.gate, "expert": part.experts} if part.experts else {}
    written, routing = model.generate_routed(
        **inputs,
        **given,
        mode=mode,
        **settings.writing.asked,
        num_return_sequences=1,
        max_new_tokens=settings.max_new_tokens,
        pad_token_id=padding_id(model),
    )
    if routing is not None:
        names = [model.expert_names[expert] for expert in routing.expert.tolist()]
        fallback, probability = routing.fallback.tolist(), routing.probability
        part = replace(part, experts=names, gate=routing.gate, fallback=fallback, probability=probability)
    answers = _routed(model, part, settings)
    prompt = 1 if model.backbone.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return answers, list(written[:, prompt:])


def _routed(model: TwinModel, part: _Group, settings: PredictSettings) -> list[Answer]:
    """What every answer says of its way, and whether that is uncertain."""
    answers = ways_of(model.expert_names, part.experts, part.gate, part.fallback, part.probability)
    if part.probability is not None and settings.uncertain_below is not None:
        for answer, first in zip(answers, part.probability.amax(dim=1).tolist(), strict=True):
            answer["uncertain"] = first < settings.uncertain_below
    return answers


def ways_of(
    names: Sequence[str],
    experts: Sequence[str | None],
    gate: Tensor,
    fallback: Sequence[bool],
    probability: Tensor | None,
) -> list[Answer]:
    """What answers say of where their rows went.

    Args:
        names: of all experts, in the gate's order.
        experts: that answer, one a row.
        gate: (row, expert).
        fallback: whether the shared expert answers alone, one a row.
        probability: (row, expert), calibrated, of the router; None where it was not asked.
    """
    answers: list[Answer] = [
        {
            "expert": expert,
            "gate": {name: round(weight, 6) for name, weight in zip(names, row, strict=True)},
            "fallback": alone,
        }
        for expert, row, alone in zip(experts, gate.tolist(), fallback, strict=True)
    ]
    if probability is not None:
        values, columns = (found.tolist() for found in probability.topk(2, dim=1))
        for answer, (first, second), (_, column) in zip(answers, values, columns, strict=True):
            answer["confidence"] = round(first, 6)
            answer["second"] = {"expert": names[column], "probability": round(second, 6)}
    return answers


@contextmanager
def _seeded(writing: Writing, numbers: Sequence[int], device: torch.device) -> Iterator[None]:
    """Random numbers of a batch, its own by the rows in it, which leave those of the caller as they were."""
    if not writing.samples:
        yield
        return
    found = hashlib.sha256(f"{writing.seed} {list(numbers)}".encode()).digest()
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=_forked(device)):
        torch.manual_seed(int.from_bytes(found[:7]))
        yield


def _forked(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type
