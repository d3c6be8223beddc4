"""Answers rows: in bounded windows, in input order, and taken up after a kill."""

import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import DataError, GateError, InputError
from twinmerge.files.rows import (
    STANDARD,
    Row,
    RowReader,
    characters_of,
    count_lines,
    folder_of,
    located,
    open_rows,
    refuse_taken,
)
from twinmerge.files.strict_json import read_json
from twinmerge.files.tables import RowFile
from twinmerge.files.target import GrowingFile, growing_file
from twinmerge.hf.answers import CONTINUATION, Answer, Answers, Reading, answers_of, fields_of, require_texts
from twinmerge.hf.batches import DEFAULTS, BatchLimits, PredictSettings
from twinmerge.hf.generate import end_ids, sees_padding
from twinmerge.hf.heads import TwinOutput
from twinmerge.hf.inputs import (
    Encoded,
    batches_of,
    encode,
    fault_of,
    is_chat,
    pad,
    padding_id,
    require_readable,
    spans_of,
    tokenizer_of,
)
from twinmerge.hf.model import Mode, TwinModel
from twinmerge.hf.positions import reads_position_table
from twinmerge.jobs.build import versions
from twinmerge.runtime.precision import PrecisionChoice, Running
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.twin.manifest import MANIFEST

WINDOW_ROWS, WINDOW_CHARACTERS, WINDOW_IMAGES = 2048, 1 << 24, 256
"""What is read, sorted by length and answered at a time."""
_FALLBACK, _UNCERTAIN, _UNREADABLE = "", "?", "!"
"""Count other rows among those of experts, none of which is named so: left to the shared expert, uncertain, unread."""


def predict(
    model: TwinModel,
    rows: Iterable[Row],
    *,
    expert: str | None = None,
    limits: BatchLimits = PredictSettings.limits,
    max_new_tokens: int = PredictSettings.max_new_tokens,
    uncertain_below: float | None = None,
    leave_out: bool = False,
    skip_unreadable: bool = False,
    precision: PrecisionChoice | None = None,
    gate: Mapping[str, float] | None = None,
) -> Iterator[Answer]:
    """Answer rows in input order, in bounded memory.

    A row's answer is its own whatever it shares a batch with, to float tolerance; the same rows in the same order give
    the same bits, whatever the model was asked before.

    Args:
        model: the twin.
        rows: {"text": ...}, perhaps with "text_pair"; {"prompt": ...} or {"messages": [...]}; {"image": ...}, a path,
            bytes or a data URI. Other fields are handed through.
        expert: use this expert alone, not the router.
        limits: of a batch.
        max_new_tokens: of a causal LM's continuation.
        uncertain_below: answers say whether they are "uncertain": the router's confidence is below this, [0, 1].
        leave_out: rows that are uncertain get no answer at all.
        skip_unreadable: rows whose images cannot be read get an "error" instead of an answer.
        precision: of matrix products; weights stay as they were loaded. None leaves that to weights and caller.
        gate: expert -> weight, of every row, instead of the router's; the head is `expert`'s, else the largest's.

    Yields:
        {"expert", "gate", "fallback", "confidence", "second", ..., and the row's fields}: the probability that the
        expert is the right one, calibrated on router data, and the next likeliest with its own; neither where the
        caller names the expert. Between them what the expert's head answers (see hf/answers.py), such as "label" and
        "score", or for a causal LM "continuation", decoded greedily under the gate of the row's text, and
        "stop_reason".

    Raises:
        GateError: if the expert is unknown, or there is no router and neither expert nor gate is given.
        DataError: if a row has a field of the answer's, or lacks a text that its head needs.
        MismatchError: if an expert's head answers no rows of text.
    """
    settings = PredictSettings(
        expert, limits, max_new_tokens, uncertain_below, leave_out, skip_unreadable, precision, gate
    )
    return chain.from_iterable(predict_windows(model, rows, settings))


def predict_windows(
    model: TwinModel, rows: Iterable[Row], settings: PredictSettings, answered: Callable[[int], None] = lambda _: None
) -> Iterator[list[Answer]]:
    """`predict`, a window of answers at a time; no row is read before the window before it was taken.

    Args:
        model: the twin.
        rows: as for `predict`.
        settings: who answers, and how much at a time.
        answered: called with the number of rows of every batch, once it is answered.
    """
    _require_settings(settings, model.expert_names, routes=model.router is not None)
    kinds = answers_by_expert(model)
    owner = settings.owner
    asked = [kinds[owner]] if owner is not None else list(dict.fromkeys(kinds.values()))
    taken, seen = fields_of(kinds.values()) + (("error",) if settings.skip_unreadable else ()), 0
    for window in _windows(rows, WINDOW_IMAGES if model.reads_images else WINDOW_ROWS):
        for index, row in enumerate(window, start=seen + 1):
            refuse_taken(row, taken, f"row {index}")
            if not settings.skip_unreadable:
                require_readable(model, row, f"row {index}")
            if len(asked) == 1:
                require_texts(asked[0], row, f"row {index}")
        faults = _faults(model, window) if settings.skip_unreadable else {}
        answers: list[Answer] = [{"error": faults.get(index, ""), **row} for index, row in enumerate(window)]
        whole = [index for index in range(len(window)) if index not in faults]
        answered(len(faults))
        numbers = [seen + index + 1 for index in whole]
        for chosen, found in _answer(model, [window[index] for index in whole], settings, kinds, numbers):
            for place, answer in zip(chosen, found, strict=True):
                answers[whole[place]] = {**answer, **window[whole[place]]}
            answered(len(chosen))
        seen += len(window)
        yield [answer for answer in answers if not (settings.leave_out and answer.get("uncertain"))]


def _faults(model: TwinModel, rows: Sequence[Row]) -> dict[int, str]:
    """Why images cannot be read, by the row's index."""
    found = {index: fault_of(model, row) for index, row in enumerate(rows)}
    return {index: fault for index, fault in found.items() if fault is not None}


def answers_by_expert(model: TwinModel) -> dict[str, Answers]:
    """How each expert answers: by its head, or by the output layer that all share."""
    if model.heads:
        heads: Mapping[str, Any] = dict(model.heads.items())
        return {n: answers_of(h.config, f"expert {n!r}", type(h).__name__) for n, h in heads.items()}
    shared = answers_of(model.backbone.config, "the shared expert", type(model.backbone).__name__)
    return dict.fromkeys(model.expert_names, shared)


def _answers_in(artifact: TwinArtifact) -> dict[str, Answers]:
    """The same of a twin on disk."""
    found = {}
    for name in artifact.expert_names:
        head = artifact.path / "experts" / name / "head"
        config = read_json((head if head.is_dir() else artifact.path) / "config.json")
        found[name] = answers_of(config, f"expert {name!r}")
    return found


def _require_settings(settings: PredictSettings, known: Sequence[str], *, routes: bool) -> None:
    named = [*([] if settings.expert is None else [settings.expert]), *(settings.gate or ())]
    if unknown := [name for name in named if name not in known]:
        raise GateError(f"unknown expert {unknown[0]!r}; this twin has {', '.join(known)}")
    if not all(math.isfinite(weight) for weight in (settings.gate or {}).values()):
        raise GateError(f"a gate's weights must be finite, found {dict(settings.gate or {})}")
    if settings.owner is None and not routes:
        raise GateError("this twin has no router; name an expert (--expert) or give a gate (--gate)")
    least = settings.uncertain_below
    if least is not None and (settings.owner is not None or not 0 <= least <= 1):
        found = f"{least} beside expert {settings.owner!r}" if settings.owner is not None else least
        raise GateError(f"uncertain_below is of the router's confidence, from 0 to 1, found {found}")
    if settings.leave_out and least is None:
        raise GateError("to leave out uncertain rows, say below which confidence they are (uncertain_below)")


def predict_file(
    twin: Path | str,
    source: Path,
    target: Path,
    settings: PredictSettings = DEFAULTS,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[int, int | None], None] = lambda *_: None,
) -> dict[str, Any]:
    """Answer a file of JSON lines with another, line by line.

    What is finished of the output is on disk after every window, in `.NAME.partial` beside it, and the next run with
    `resume` goes on there; the output appears complete or not at all.

    Args:
        twin: folder of a twin.
        source: rows, as `RowFile.parse` takes them: JSON lines, CSV, ..., or a folder; `-` is standard input.
        target: answers in the order of the rows; `-` is standard output, which keeps nothing to go on with.
        settings: who answers, and how much at a time.
        device: where the twin computes.
        overwrite: replace the output, and what an interrupted run left of it.
        resume: go on with what an interrupted run left; the bytes are those of a run that was not interrupted.
        progress: called with the rows answered so far and their number, None if that is not known.

    Returns:
        `rows`, how many of them were `resumed`, how many each of `experts` answered, how many were left to the
        shared expert, as unlike every expert's inputs (`fallback`), how many were `uncertain` (None if nobody asked),
        of how many the image was `unreadable`, and the `precision` of matrix products.

    Raises:
        InputError: whatever is wrong with twin, rows or settings, in one line; a bad row is named by file and line.
    """
    artifact = TwinArtifact.open(twin).require_model()
    _require_settings(settings, artifact.expert_names, routes=artifact.manifest.recipe.router is not None)
    running = Running.of(artifact.dtype, settings.precision, device)
    taken = fields_of(_answers_in(artifact).values())
    if resume and target == STANDARD:
        raise InputError("standard output keeps nothing to go on with; name a file to resume")
    fingerprint = {
        "twin": hashlib.sha256((artifact.path / MANIFEST).read_bytes()).hexdigest(),
        "device": device,
        **asdict(settings),
        "precision": running.products,
        "window": [WINDOW_ROWS, WINDOW_CHARACTERS, WINDOW_IMAGES],
        "versions": versions(),
    }
    given = RowFile.parse(str(source))
    with open_rows(given) as file:
        total = count_lines(given)
        with _output(target, fingerprint, overwrite=overwrite, resume=resume) as output:
            before = output.last or {"rows": 0, "bytes": 0, "sha256": hashlib.sha256().hexdigest(), "experts": {}}
            if not output.complete:
                name = "standard input" if source == STANDARD else str(given.path)
                reader = RowReader(file, name, taken=taken)
                reader.skip(before["rows"], before["bytes"], before["sha256"])
                rows = iter(reader)
                first = list(islice(rows, 1))  # a bad first row is refused before the model is loaded
                model = TwinModel.from_pretrained(artifact.path, dtype=running.dtype, device=device)
                counted: Counter[str] = Counter(before["experts"])
                every: Iterable[Row] = chain(first, rows)
                if model.reads_images:
                    every = (located(row, folder_of(given.path)) for row in every)
                _answer_all(model, reader, every, output, settings, counted, total, progress)
            note = output.last or before
    experts = dict(sorted(note["experts"].items()))
    fallback, uncertain, unreadable = (experts.pop(key, 0) for key in (_FALLBACK, _UNCERTAIN, _UNREADABLE))
    if settings.leave_out:
        uncertain = note["rows"] - sum(experts.values()) - fallback - unreadable
    return {
        "rows": note["rows"],
        "resumed": before["rows"],
        "experts": experts,
        "fallback": fallback,
        "uncertain": None if settings.uncertain_below is None else uncertain,
        "unreadable": unreadable,
        "precision": running.products,
    }


class _StandardOutput:
    complete = False

    def __init__(self) -> None:
        self.last: Mapping[str, Any] | None = None

    def append(self, content: bytes, note: Mapping[str, Any], kept: str) -> None:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        self.last = note


_Output = GrowingFile | _StandardOutput
"""Where windows of answers go."""


@contextmanager
def _output(target: Path, fingerprint: Mapping[str, Any], *, overwrite: bool, resume: bool) -> Iterator[_Output]:
    if target == STANDARD:
        yield _StandardOutput()
        return
    with growing_file(target, fingerprint, overwrite=overwrite, resume=resume) as growing:
        yield growing


def _answer_all(
    model: TwinModel,
    reader: RowReader,
    rows: Iterable[Row],
    output: _Output,
    settings: PredictSettings,
    experts: Counter[str],
    total: int | None,
    progress: Callable[[int, int | None], None],
) -> None:
    """Answer what is left to read, and append it window by window."""
    done = (output.last or {"rows": 0})["rows"]
    progress(done, total)

    def answered(rows: int) -> None:
        nonlocal done
        done += rows
        progress(done, total)

    for answers in predict_windows(model, rows, settings, answered):
        experts.update(_counted(answer) for answer in answers)
        experts.update(_UNCERTAIN for answer in answers if answer.get("uncertain"))
        content = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        note = {"rows": reader.rows, "bytes": reader.bytes, "sha256": reader.sha256, "experts": dict(experts)}
        output.append(content.encode(), note, f"the answers of {reader.rows:,} rows are")


def _counted(answer: Answer) -> str:
    """As what an answer counts."""
    if "expert" not in answer:
        return _UNREADABLE
    return _FALLBACK if answer["fallback"] else str(answer["expert"])


def _windows(rows: Iterable[Row], most: int) -> Iterator[list[Row]]:
    """Rows by the window; the row that makes a window full is its last, so that none is read ahead."""
    window: list[Row] = []
    characters = 0
    for row in rows:
        window.append(row)
        characters += characters_of(row)
        if len(window) >= most or characters >= WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


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


def _answer(
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
            with context(device):
                answers, outputs = (_continued if generates else _labelled)(model, picked, part, settings, mode)
            for index, one, answer, output in zip(part.rows, picked, answers, outputs, strict=True):
                name = answer["expert"]
                require_texts(kinds[name], rows[index], f"row {numbers[index]}, answered by expert {name!r}")
                answer |= kinds[name].read(_reading(model, kinds[name], name, rows[index], one, output))
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


def _reading(model: TwinModel, kind: Answers, expert: str, row: Row, encoded: Encoded, output: Tensor) -> Reading:
    owner: Any = model.heads[expert] if model.heads else model.backbone
    if kind is CONTINUATION:
        decode = partial(tokenizer_of(model, expert).decode, skip_special_tokens=True)
        settings = _generation(model, expert)
        stops = settings.stop_strings or ()
        stops = (stops,) if isinstance(stops, str) else stops
        return Reading(row, output, owner.config, decode=decode, ends=end_ids(settings), stops=stops)
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
    """Greedy continuations, written with padding on the left; a decoder of its own begins anew."""
    inputs: dict[str, Any] = pad(model, encoded, side="right" if model.backbone.config.is_encoder_decoder else "left")
    given: dict[str, Any] = {"gate": part.gate, "expert": part.experts} if part.experts else {}
    written, routing = model.generate_routed(
        **inputs,
        **given,
        mode=mode,
        do_sample=False,
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
    """What every answer says of its way."""
    answers: list[Answer] = [
        {
            "expert": name,
            "gate": {expert: round(weight, 6) for expert, weight in zip(model.expert_names, row, strict=True)},
            "fallback": alone,
        }
        for name, row, alone in zip(part.experts, part.gate.tolist(), part.fallback, strict=True)
    ]
    if part.probability is not None:
        values, columns = (found.tolist() for found in part.probability.topk(2, dim=1))
        for answer, (first, second), (_, column) in zip(answers, values, columns, strict=True):
            answer["confidence"] = round(first, 6)
            answer["second"] = {"expert": model.expert_names[column], "probability": round(second, 6)}
            if settings.uncertain_below is not None:
                answer["uncertain"] = first < settings.uncertain_below
    return answers
