"""Splits of the twenty tasks: the same text in the same part of every task, as many rows as there are."""

from dataclasses import replace

import pytest

from suites.text import data, prepare, twenty
from suites.text.data import Row, Task

TASK = replace(data.TASKS["trec"], classes=None)


def rows(count: int, labels: str = "abc") -> list[Row]:
    return [Row(f"text number {i}", labels[i % len(labels)]) for i in range(count)]


def texts(part: tuple[Row, ...]) -> set[str]:
    return {row.text for row in part}


def test_parts_hold_what_they_should_and_share_nothing() -> None:
    parts = twenty.split(TASK, rows(4000), 0).parts()
    assert {name: len(part) for name, part in parts.items()} == twenty.SIZES
    assert len(set.union(*(texts(part) for part in parts.values()))) == sum(twenty.SIZES.values())


def test_small_tasks_get_their_shares() -> None:
    parts = twenty.split(TASK, rows(600), 0).parts()
    for name, share in twenty.SHARES.items():
        assert len(parts[name]) == pytest.approx(600 * share, abs=50)


def test_a_text_is_in_the_same_part_of_every_task_that_holds_it() -> None:
    whole, some = (twenty.split(replace(TASK, classes=c), rows(500), 0).parts() for c in (None, ("a",)))
    for name, part in some.items():
        assert {row.label for row in part} == {"a"}
        assert texts(part) == {row.text for row in whole[name] if row.label == "a"}


def test_seeds_share_their_test_rows_alone() -> None:
    first, second = (twenty.split(TASK, rows(3000), seed) for seed in (0, 1))
    assert first.test == second.test
    assert texts(first.router) != texts(second.router)
    assert first == twenty.split(TASK, rows(3000)[::-1], 0)


def test_there_are_twenty_and_pairs_that_overlap_have_one_source() -> None:
    assert len(twenty.TASKS) == 20
    assert all(name == task.name for name, task in twenty.TASKS.items())

    def archive(task: Task) -> str:
        return task.source.archive.requirement + task.source.member

    assert all(archive(twenty.TASKS[a]) == archive(twenty.TASKS[b]) for a, b in twenty.OVERLAPPING)


def test_tasks_of_another_suite_are_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(prepare.parse(["--suite", "text20"]).tasks) == 20
    with pytest.raises(SystemExit):
        prepare.parse(["--suite", "text20", "--tasks", "wordnet"])
    assert "unknown task 'wordnet'; tasks are disaster" in capsys.readouterr().err
