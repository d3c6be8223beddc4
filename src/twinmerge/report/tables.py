"""Says results in words: sentences, the terminal's table, numbers as text.

Every figure comes from the `SuiteResult`; normalized scores are shown times 100.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import TYPE_CHECKING, Final

from twinmerge.eval.metrics import CONFIDENCE
from twinmerge.eval.results import Interval, Kind, Protocol, SuiteResult, Summary

if TYPE_CHECKING:
    from rich.table import Table as RichTable

KIND_NAMES: Final[dict[Kind, str]] = {
    "twin": "twin",
    "dynamic": "other dynamic",
    "static": "static merge",
    "base": "pretrained",
    "experts": "experts",
}
PROTOCOL_NAMES: Final[dict[Protocol, str]] = {"routed": "routed", "oracle_head": "oracle head"}
_MISSING = "–"


def terminal_table(result: SuiteResult) -> RichTable:
    """The main table for the terminal: normalized scores x100, with half of their intervals, bytes and time."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"{result.suite}: normalized score x100, ± half of the {100 * CONFIDENCE:.0f} % interval"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("contestant", overflow="fold")
    for heading in MAIN_HEADINGS[2:]:  # the kind and the ends of intervals are left out, for titles at 80 columns
        table.add_column(heading, justify="right", no_wrap=True)
    best = headline(result)
    for one in result.summaries:
        scores = [_with_half(one.normalized_routed), _with_half(one.normalized_oracle_head)]
        table.add_row(one.title, *scores, *main_cells(one)[4:], style="bold" if one is best else None)
    return table


def summary_sentences(result: SuiteResult) -> list[str]:
    """What was found, in plain words; one sentence each."""
    best = headline(result)
    if best is None:
        return [f"{len(result.summaries)} contestants on {len(result.tasks)} tasks; no twin among them."]
    protocol, kept = best_protocol(best)
    who = "with no task ID" if protocol == "routed" else "with the head of each task given"
    sentences = [
        f"{best.title} keeps {points(kept.value)} % of its experts' quality over {len(result.tasks)} tasks {who} "
        f"({100 * CONFIDENCE:.0f} % interval {points(kept.low)} to {points(kept.high)}), storing "
        f"{times(best.exclusive_ratio)} of the base model's bytes beside one shared model."
    ]
    static = max((one for one in result.summaries if one.kind == "static"), key=best_value, default=None)
    if static is not None:
        sentences.append(_against_static(result, best, protocol, static))
    sentences.append(
        f"All {len(result.tasks)} experts themselves take {times(result.expert_bytes / result.base_bytes)} "
        "of the base model's bytes."
    )
    accuracy = routing_accuracy(best)
    if accuracy is not None:
        sentences.append(f"Its router sends {percent(accuracy)} of the inputs to the right expert.")
    return sentences


def _against_static(result: SuiteResult, best: Summary, protocol: Protocol, static: Summary) -> str:
    sentence = f"The best static merge, {static.title}, keeps {points(best_value(static))} %"
    for pair in result.comparisons:
        if (pair.contestant, pair.reference, pair.protocol) == (best.name, static.name, protocol):
            return f"{sentence}: a difference of {with_interval(pair.difference)} points."
    return f"{sentence}."


# --- what is shown -----------------------------------------------------------------------------------------------


def headline(result: SuiteResult) -> Summary | None:
    """The smallest twin whose interval reaches the best twin's score."""
    twins = [one for one in result.summaries if one.kind == "twin"]
    if not twins:
        return None
    top = max(map(best_value, twins))
    return min((one for one in twins if best_protocol(one)[1].high >= top), key=lambda one: one.exclusive_ratio)


def best_protocol(summary: Summary) -> tuple[Protocol, Interval]:
    """The score without a task ID if there is one, else with the head given."""
    if summary.normalized_routed is not None:
        return "routed", summary.normalized_routed
    return "oracle_head", summary.normalized_oracle_head


def best_value(summary: Summary) -> float:
    """The better protocol's score."""
    return best_protocol(summary)[1].value


def protocols(result: SuiteResult) -> list[Protocol]:
    """The protocols that some contestant has a score in."""
    routed = any(one.normalized_routed is not None for one in result.summaries)
    return ["routed", "oracle_head"] if routed else ["oracle_head"]


def routing_accuracy(summary: Summary) -> float | None:
    """Share of the test inputs sent to their own expert, mean over tasks."""
    if not summary.confusion:
        return None
    return fmean(row.get(task, 0) / sum(row.values()) for task, row in summary.confusion.items())


# --- rows of tables ----------------------------------------------------------------------------------------------

MAIN_HEADINGS = ["contestant", "kind", "routed", "oracle head", "exclusive", "on disk", "ms/input"]
ROUTER_HEADINGS = [
    "features",
    "method",
    "inputs/expert",
    "accuracy",
    "held out",
    "calibration error",
    "on disk",
    "seconds",
]


def main_cells(one: Summary) -> list[str]:
    """A contestant's row of the main table."""
    return [
        one.title,
        KIND_NAMES[one.kind],
        _MISSING if one.normalized_routed is None else with_interval(one.normalized_routed),
        with_interval(one.normalized_oracle_head),
        times(one.exclusive_ratio),
        size(sum(one.bytes.values())),
        milliseconds(one.ms_per_input),
    ]


def seed_rows(result: SuiteResult) -> Iterable[list[str]]:
    """Contestant, protocol, and the score at every seed."""
    for one in result.summaries:
        for protocol, values in (("routed", one.routed_by_seed), ("oracle_head", one.oracle_head_by_seed)):
            if values:
                at = dict(zip(one.seeds, values, strict=True))
                yield [one.title, protocol.replace("_", " "), *(points(at.get(seed)) for seed in result.seeds)]


# --- numbers as text ---------------------------------------------------------------------------------------------


def points(value: float | None) -> str:
    """A share times 100."""
    return _MISSING if value is None else f"{100 * value:.1f}"


def with_interval(one: Interval) -> str:
    """A score and its interval, all times 100."""
    return f"{points(one.value)} [{points(one.low)}, {points(one.high)}]"


def _with_half(one: Interval | None) -> str:
    return _MISSING if one is None else f"{points(one.value)} ±{points((one.high - one.low) / 2)}"


def percent(value: float | None) -> str:
    """A share as a percentage."""
    return _MISSING if value is None else f"{points(value)} %"


def times(ratio: float) -> str:
    """A multiple of the base model's bytes."""
    return f"{ratio:.2f}x" if ratio >= 1 else f"{ratio:.3f}x" if ratio else "0x"


def size(nbytes: int) -> str:
    """Bytes in MB or kB."""
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.1f} kB"


def milliseconds(value: float | None) -> str:
    """To a hundredth."""
    return _MISSING if value is None else f"{value:.2f}"
