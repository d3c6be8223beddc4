"""Writes the tables of a suite's results.json as Markdown into docs/results.md, between its markers."""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from twinmerge.eval.results import Protocol, RouterResult, SuiteResult, read_result
from twinmerge.report.tables import (
    MAIN_HEADINGS,
    PROTOCOL_NAMES,
    ROUTER_HEADINGS,
    main_cells,
    percent,
    points,
    protocols,
    seed_rows,
    size,
    summary_sentences,
    with_interval,
)

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results.md"


def main() -> None:
    """Replace the block."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="results.json of `twinmerge eval suites/text/text8.yaml`")
    parser.add_argument("--block", default="tables", help="name of the block that is replaced (default: tables)")
    options = parser.parse_args()
    result = read_result(options.results)
    block = re.compile(rf"(<!-- generated: {re.escape(options.block)} -->\n).*?(<!-- end of generated -->)", re.DOTALL)
    setting = (
        f"Suite `{result.suite}`, base {result.base}, seeds {', '.join(map(str, result.seeds))}; commit "
        f"`{result.environment.commit}`, {result.environment.date}, {result.environment.machine}, "
        f"{result.environment.threads} thread(s); "
        + ", ".join(f"{name} {version}" for name, version in result.environment.versions.items())
        + f"; {result.resamples:,} bootstrap resamples."
    )
    tables = markdown_tables(result)
    page, count = block.subn(lambda match: f"{match[1]}\n{setting}\n\n{tables}\n{match[2]}", PAGE.read_text("utf-8"))
    if count != 1:
        parser.error(f"{PAGE} must hold the markers of the generated block once, found {count}")
    PAGE.write_text(page, encoding="utf-8")


def markdown_tables(result: SuiteResult) -> str:
    """All tables as Markdown, under headings of the third level."""
    parts = [" ".join(summary_sentences(result))]
    parts += ["### Contestants", _markdown(MAIN_HEADINGS, map(main_cells, result.summaries))]
    for protocol in protocols(result):
        parts += [
            f"### Tasks, {PROTOCOL_NAMES[protocol]}",
            _markdown(["contestant", *result.tasks], _task_rows(result, protocol)),
        ]
    if len(result.seeds) > 1:
        headings = ["contestant", "protocol", *(f"seed {seed}" for seed in result.seeds)]
        parts += ["### Seeds", _markdown(headings, seed_rows(result))]
    if result.comparisons:
        headings = ["contestant", "against", "difference in points"]
        parts += ["### Paired differences", _markdown(headings, _comparison_rows(result))]
    if result.routers:
        parts += ["### Routers", _markdown(ROUTER_HEADINGS, map(_router_cells, result.routers))]
    unseen = [one for one in result.summaries if one.unseen]
    if unseen:
        tasks = list(dict.fromkeys(task for one in unseen for task in one.unseen))
        rows = ([one.title, *(points(one.unseen.get(task)) for task in tasks)] for one in unseen)
        parts += ["### Unseen tasks, raw score", _markdown(["contestant", *tasks], rows)]
    return "\n\n".join(parts) + "\n"


def _task_rows(result: SuiteResult, protocol: Protocol) -> Iterable[list[str]]:
    for one in result.summaries:
        if protocol == "oracle_head" or one.normalized_routed is not None:
            yield [one.title, *(points(getattr(one.tasks[task], f"normalized_{protocol}")) for task in result.tasks)]
    if result.summaries:
        yield ["experts, raw score", *(points(result.summaries[0].tasks[task].expert) for task in result.tasks)]


def _comparison_rows(result: SuiteResult) -> Iterable[list[str]]:
    titles = {one.name: one.title for one in result.summaries}

    for pair in result.comparisons:
        contestant = f"{titles[pair.contestant]} ({PROTOCOL_NAMES[pair.protocol]})"
        yield [contestant, titles[pair.reference], with_interval(pair.difference)]


def _router_cells(router: RouterResult) -> list[str]:
    return [
        router.features,
        router.method,
        str(router.inputs_per_expert),
        percent(router.accuracy),
        percent(router.held_out_accuracy),
        f"{router.calibration_error:.3f}",
        size(router.nbytes),
        f"{router.seconds:.1f}",
    ]


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(headings), line(["---"] * len(headings)), *map(line, rows)])


if __name__ == "__main__":
    main()
