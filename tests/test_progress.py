"""Progress where stderr is no terminal: a line every few seconds with rate and time left, and each stage's end."""

from twinmerge.cli.progress import EVERY_S, Lines


def told(reports: list[tuple[float, str, int, int | None]], quiet: bool = False) -> list[str]:
    """The lines of reports, each at its second."""
    lines: list[str] = []
    at = [0.0]
    report = Lines(lines.append, quiet=quiet, clock=lambda: at[0])
    for second, stage, done, total in reports:
        at[0] = second
        report(stage, done, total)
    return lines


def test_long_stages_say_how_far_they_are_and_what_is_left() -> None:
    reports = [(float(s), "rows", 10 * s, 200) for s in range(21)]
    assert told(reports) == [
        "rows: 50 of 200, 10.0/s, 15 s left",
        "rows: 100 of 200, 10.0/s, 10 s left",
        "rows: 150 of 200, 10.0/s, 5 s left",
        "rows: 200 in 20 s",
    ]


def test_rate_counts_from_where_a_resumed_run_went_on() -> None:
    assert told([(0, "rows", 900, None), (EVERY_S, "rows", 1000, None)]) == ["rows: 1,000, 20.0/s"]


def test_short_stages_are_one_line_and_none_where_quiet() -> None:
    reports = [(0.0, "hashing", 1, 2), (0.2, "hashing", 2, 2), (0.3, "fitted", 1, 1)]
    assert told(reports) == ["hashing: 2", "fitted: 1"]
    assert told(reports, quiet=True) == []
    slow = [(0.0, "rows", 0, 9), (EVERY_S + 1, "rows", 9, 9)]
    assert told(slow, quiet=True) == ["rows: 9 in 6 s"]


def test_a_stage_that_comes_again_counts_anew() -> None:
    reports = [(0.0, "rows", 0, 2), (9.0, "rows", 2, 2), (10.0, "rows", 0, 2), (12.0, "rows", 2, 2)]
    assert told(reports) == ["rows: 2 in 9 s", "rows: 2 in 2 s"]
