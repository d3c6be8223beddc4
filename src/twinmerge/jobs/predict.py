"""Answers rows: in bounded windows, in input order, and taken up after a kill."""

import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

from twinmerge.errors import GateError, InputError
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
from twinmerge.hf.answers import CONTINUATION, Answer, Answers, answers_of, fields_of, require_texts
from twinmerge.hf.batches import DEFAULTS, BatchLimits, PredictSettings, Writing
from twinmerge.hf.generate import require_stops
from twinmerge.hf.inputs import (
    fault_of,
    require_readable,
    tokenizer_of,
)
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.answering import answer_rows, answers_by_expert
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
    writing: Writing = PredictSettings.writing,
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
        writing: how texts are written: greedily, by beams or by sampling, and what ends them.

    Yields:
        {"expert", "gate", "fallback", "confidence", "second", ..., and the row's fields}: the probability that the
        expert is the right one, calibrated on router data, and the next likeliest with its own; neither where the
        caller names the expert. Between them what the expert's head answers (see hf/answers.py), such as "label" and
        "score", or for a causal LM "continuation", written under the gate of the row's text, and "stop_reason".

    Raises:
        GateError: if the expert is unknown, or there is no router and neither expert nor gate is given.
        DataError: if a row has a field of the answer's, or lacks a text that its head needs.
        MismatchError: if an expert's head answers no rows of text.
    """
    settings = PredictSettings(
        expert, limits, max_new_tokens, uncertain_below, leave_out, skip_unreadable, precision, gate, writing
    )
    return chain.from_iterable(predict_windows(model, rows, settings))


def predict_windows(
    model: TwinModel,
    rows: Iterable[Row],
    settings: PredictSettings,
    answered: Callable[[int], None] = lambda _: None,
    *,
    before: int = 0,
) -> Iterator[list[Answer]]:
    """`predict`, a window of answers at a time; no row is read before the window before it was taken.

    Args:
        model: the twin.
        rows: as for `predict`.
        settings: who answers, and how much at a time.
        answered: called with the number of rows of every batch, once it is answered.
        before: rows that were answered before these; rows are counted on from there.
    """
    _require_settings(settings, model.expert_names, routes=model.router is not None)
    kinds = answers_by_expert(model)
    _require_writers(settings, kinds)
    owner = settings.owner
    if settings.writing.stop:
        for name in model.expert_names if owner is None else [owner]:
            require_stops(tokenizer_of(model, name), settings.writing.stop, f"expert {name!r}")
    asked = [kinds[owner]] if owner is not None else list(dict.fromkeys(kinds.values()))
    taken, seen = fields_of(kinds.values()) + (("error",) if settings.skip_unreadable else ()), before
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
        for chosen, found in answer_rows(model, [window[index] for index in whole], settings, kinds, numbers):
            for place, answer in zip(chosen, found, strict=True):
                answers[whole[place]] = {**answer, **window[whole[place]]}
            answered(len(chosen))
        seen += len(window)
        yield [answer for answer in answers if not (settings.leave_out and answer.get("uncertain"))]


def _faults(model: TwinModel, rows: Sequence[Row]) -> dict[int, str]:
    """Why images cannot be read, by the row's index."""
    found = {index: fault_of(model, row) for index, row in enumerate(rows)}
    return {index: fault for index, fault in found.items() if fault is not None}


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


def _require_writers(settings: PredictSettings, kinds: Mapping[str, Answers]) -> None:
    if settings.writing != Writing() and CONTINUATION not in kinds.values():
        raise InputError(
            "beams, sampling and stop strings are of experts that write texts; "
            f"those of this twin answer with {', '.join(sorted({kind.kind for kind in kinds.values()}))}"
        )


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
    kinds = _answers_in(artifact)
    _require_writers(settings, kinds)
    taken = fields_of(kinds.values())
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

    for answers in predict_windows(model, rows, settings, answered, before=done):
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
