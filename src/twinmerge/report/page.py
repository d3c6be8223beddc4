"""Writes results.json and report.html, one page that loads nothing from anywhere."""

from importlib.resources import files
from pathlib import Path

from twinmerge.eval.metrics import CONFIDENCE
from twinmerge.eval.results import SuiteResult, write_result
from twinmerge.report import tables
from twinmerge.report.plots import plot_bytes, plot_reliability, plot_tasks, score_axis


def write_report(result: SuiteResult, folder: Path) -> Path:
    """Write results.json and report.html into a folder, made if it is not there; returns the path of report.html."""
    page = render_html(result)
    folder.mkdir(parents=True, exist_ok=True)
    write_result(result, folder / "results.json")
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def render_html(result: SuiteResult) -> str:
    """The report as one HTML page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        points=tables.points,
        ratio=tables.times,
        size=tables.size,
        milliseconds=tables.milliseconds,
        percent=tables.percent,
    )
    template = files("twinmerge.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    chosen = tables.headline(result)
    return environment.from_string(template).render(
        result=result,
        headline=chosen,
        headline_score=None if chosen is None else tables.best_protocol(chosen),
        confidence=f"{100 * CONFIDENCE:.0f}",
        sentences=tables.summary_sentences(result),
        kind_names=tables.KIND_NAMES,
        protocol_names=tables.PROTOCOL_NAMES,
        protocols=tables.protocols(result),
        titles={one.name: one.title for one in result.summaries},
        axis=score_axis(result.summaries),
        router_accuracy=None if chosen is None else tables.routing_accuracy(chosen),
        routers=result.routers,
        seed_rows=list(tables.seed_rows(result)),
        router_headings=tables.ROUTER_HEADINGS,
        unseen=list(dict.fromkeys(task for one in result.summaries for task in one.unseen)),
        plot_tasks=plot_tasks(result),
        plot_bytes=plot_bytes(result),
        plot_reliability=plot_reliability(result),
    )
