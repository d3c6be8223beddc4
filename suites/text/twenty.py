"""Twenty smaller text tasks: class splits and other sets, of which three pairs overlap. Knows no model."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from suites.text import data
from suites.text.data import Row, Splits, Task, key_of

SIZES = {"test": 300, "router": 300, "validation": 100, "train": 800}
SHARES = {"test": 0.3, "router": 0.2, "validation": 0.1, "train": 0.4}
"""Of a source's texts: a text is in the same part of every task that holds it."""

_SUPERSENSES = {
    "living": ("animal", "person", "plant"),
    "things": ("artifact", "food", "substance"),
    "ideas": ("attribute", "cognition", "communication", "feeling"),
    "events": ("act", "event", "process", "state"),
    "world": ("body", "group", "location", "quantity", "time"),
}
_NEWSGROUPS = {
    "comp": (
        "comp.graphics",
        "comp.os.ms-windows.misc",
        "comp.sys.ibm.pc.hardware",
        "comp.sys.mac.hardware",
        "comp.windows.x",
    ),
    "rec": ("rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey"),
    "sci": ("sci.crypt", "sci.electronics", "sci.med", "sci.space"),
    "talk": ("talk.politics.guns", "talk.politics.mideast", "talk.politics.misc", "talk.religion.misc"),
    "hardware": ("comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware"),
}
_QUESTIONS = ("NUM:count", "NUM:date", "NUM:money", "NUM:other", "NUM:period")

TASKS: dict[str, Task] = {
    **{
        name: replace(data.TASKS[name], epochs=3)
        for name in ("disaster", "election", "movie", "reuters", "sms", "trec")
    },
    **{name: Task(name, data.UNSEEN[name], epochs=3) for name in ("nyt", "tweets")},
    **{
        f"wordnet_{name}": replace(data.TASKS["wordnet"], name=f"wordnet_{name}", classes=classes, epochs=3)
        for name, classes in _SUPERSENSES.items()
    },
    **{
        f"news_{name}": Task(f"news_{name}", data.TASKS["news20"].source, max_length=80, epochs=3, classes=classes)
        for name, classes in _NEWSGROUPS.items()
    },
    "trec_number": Task("trec_number", data.FINE_QUESTIONS, epochs=3, classes=_QUESTIONS),
    "reuters_money": Task(
        "reuters_money",
        data.TASKS["reuters"].source,
        max_length=80,
        epochs=3,
        classes=("interest", "money-fx", "trade"),
    ),
}
OVERLAPPING = (("news_comp", "news_hardware"), ("trec", "trec_number"), ("reuters", "reuters_money"))
"""Pairs of which the second's texts are texts of the first, too."""


def split(task: Task, rows: Sequence[Row], seed: int) -> Splits:
    """Cut clean rows by what their texts hash to.

    Args:
        task: whose rows they are; `classes` says which of them count.
        rows: clean rows of its source.
        seed: decides everything but the test rows.

    Returns:
        The splits, each of at most `SIZES` rows.
    """
    kept = sorted((r for r in rows if task.classes is None or r.label in task.classes), key=lambda r: _hash(r, "order"))
    parts: dict[str, list[Row]] = {name: [] for name in SIZES}
    for row in kept:
        at = _hash(row, "test")
        if at >= SHARES["test"]:
            rest = _hash(row, f"seed {seed}") * (1 - SHARES["test"])
            part = next(name for name, end in _ENDS.items() if rest < end)
        else:
            part = "test"
        if len(parts[part]) < SIZES[part]:
            parts[part].append(row)
    labels = tuple(sorted({row.label for row in kept}))
    return Splits(**{name: tuple(found) for name, found in parts.items()}, labels=labels, rest=())


_ENDS = {"router": SHARES["router"], "validation": SHARES["router"] + SHARES["validation"], "train": 1.0}


def _hash(row: Row, salt: str) -> float:
    """A number of [0, 1) that a text has under a salt, in whatever task."""
    digest = hashlib.sha256(f"{salt}/{key_of(row.text)}".encode()).digest()
    return int.from_bytes(digest[:7], "little") / 2**56
