"""Results as tables and plots: the terminal's table, Markdown for the docs, and one self-contained report.html.

Every figure in a text or a table comes from the `SuiteResult`; normalized scores are shown times 100.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

from twinmerge.eval.metrics import CONFIDENCE
from twinmerge.eval.results import Interval, Kind, Protocol, RouterResult, SuiteResult, Summary, write_result

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
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

# Plots are drawn in colours that stand for names; the page has CSS variables in their place, to follow dark mode.
_INK, _MUTED, _GRID, _CARD = "#000001", "#000002", "#000003", "#000004"
_KIND_COLOURS: Final[dict[Kind, str]] = {
    "twin": "#000011",
    "dynamic": "#000012",
    "static": "#000013",
    "base": "#000014",
    "experts": "#000015",
}
_CSS_COLOURS = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--line)",
    _CARD: "var(--card)",
    **{colour: f"var(--kind-{kind})" for kind, colour in _KIND_COLOURS.items()},
}
_PLOT_WIDTH = 6.8  # inches; heights too
_MARKERS: Final[dict[Kind, str]] = {"twin": "o", "dynamic": "D", "static": "s", "base": "v", "experts": "P"}
_PLOT_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def write_report(result: SuiteResult, folder: Path) -> Path:
    """Write results.json and report.html, a page that loads nothing from anywhere.

    Args:
        result: what the suite found.
        folder: where to; made if it is not there.

    Returns:
        The path of report.html.
    """
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
        points=_points,
        ratio=_times,
        size=_size,
        milliseconds=_milliseconds,
        percent=_percent,
        cell=_cell,
        columns=_columns,
    )
    template = files("twinmerge").joinpath("report_template.html.j2").read_text(encoding="utf-8")
    chosen = _headline(result)
    return environment.from_string(template).render(
        result=result,
        headline=chosen,
        headline_score=None if chosen is None else _best_protocol(chosen),
        confidence=f"{100 * CONFIDENCE:.0f}",
        sentences=summary_sentences(result),
        kind_names=KIND_NAMES,
        protocol_names=PROTOCOL_NAMES,
        protocols=_protocols(result),
        titles={one.name: one.title for one in result.summaries},
        axis=_score_axis(result.summaries),
        router_accuracy=None if chosen is None else _routing_accuracy(chosen),
        routers=_mean_routers(result.routers),
        seed_rows=list(_seed_rows(result)),
        router_headings=_ROUTER_HEADINGS,
        unseen=list(dict.fromkeys(task for one in result.summaries for task in one.unseen)),
        plot_tasks=_plot_tasks(result),
        plot_bytes=_plot_bytes(result),
        plot_reliability=_plot_reliability(result),
    )


def terminal_table(result: SuiteResult) -> RichTable:
    """The main table for the terminal: normalized scores x100 with intervals, bytes and time."""
    from rich.table import Table

    table = Table(
        title=f"{result.suite}: normalized score x100, {100 * CONFIDENCE:.0f} % intervals", title_justify="left"
    )
    for index, heading in enumerate(_MAIN_HEADINGS):
        table.add_column(heading, justify="left" if index < 2 else "right", overflow="fold")
    best = _headline(result)
    for one in result.summaries:
        table.add_row(*_main_cells(one), style="bold" if one is best else None)
    return table


def markdown_tables(result: SuiteResult) -> str:
    """All tables as Markdown, under headings of the third level."""
    parts = [" ".join(summary_sentences(result))]
    parts += ["### Contestants", _markdown(_MAIN_HEADINGS, map(_main_cells, result.summaries))]
    for protocol in _protocols(result):
        parts += [
            f"### Tasks, {PROTOCOL_NAMES[protocol]}",
            _markdown(["contestant", *result.tasks], _task_rows(result, protocol)),
        ]
    if len(result.seeds) > 1:
        headings = ["contestant", "protocol", *(f"seed {seed}" for seed in result.seeds)]
        parts += ["### Seeds", _markdown(headings, _seed_rows(result))]
    if result.comparisons:
        headings = ["contestant", "against", "difference in points"]
        parts += ["### Paired differences", _markdown(headings, _comparison_rows(result))]
    if result.routers:
        parts += ["### Routers", _markdown(_ROUTER_HEADINGS, map(_router_cells, _mean_routers(result.routers)))]
    unseen = [one for one in result.summaries if one.unseen]
    if unseen:
        tasks = list(dict.fromkeys(task for one in unseen for task in one.unseen))
        rows = ([one.title, *(_points(one.unseen.get(task)) for task in tasks)] for one in unseen)
        parts += ["### Unseen tasks, raw score", _markdown(["contestant", *tasks], rows)]
    for table in result.ablations.values():
        parts += [
            f"### {table.title}",
            _markdown(table.columns, ([_cell(value) for value in row] for row in table.rows)),
        ]
        parts += [table.note] if table.note else []
    return "\n\n".join(parts) + "\n"


def summary_sentences(result: SuiteResult) -> list[str]:
    """What was found, in plain words; one sentence each."""
    best = _headline(result)
    if best is None:
        return [f"{len(result.summaries)} contestants on {len(result.tasks)} tasks; no twin among them."]
    protocol, kept = _best_protocol(best)
    who = "with no task ID" if protocol == "routed" else "with the head of each task given"
    sentences = [
        f"{best.title} keeps {_points(kept.value)} % of its experts' quality over {len(result.tasks)} tasks {who} "
        f"({100 * CONFIDENCE:.0f} % interval {_points(kept.low)} to {_points(kept.high)}), storing "
        f"{_times(best.exclusive_ratio)} of the base model's bytes beside one shared model."
    ]
    static = max((one for one in result.summaries if one.kind == "static"), key=_best_value, default=None)
    if static is not None:
        sentences.append(_against_static(result, best, protocol, static))
    sentences.append(
        f"All {len(result.tasks)} experts as full models would take {_times(result.expert_bytes / result.base_bytes)} "
        "of the base model's bytes."
    )
    accuracy = _routing_accuracy(best)
    if accuracy is not None:
        sentences.append(f"Its router sends {_percent(accuracy)} of the inputs to the right expert.")
    return sentences


def _against_static(result: SuiteResult, best: Summary, protocol: Protocol, static: Summary) -> str:
    static_protocol, kept = _best_protocol(static)
    told = " although it is told the task" if protocol == "routed" and static_protocol == "oracle_head" else ""
    sentence = f"The best static merge, {static.title}, keeps {_points(kept.value)} %{told}"
    wanted = (best.name, protocol, static.name, static_protocol)
    for pair in result.comparisons:
        if (pair.contestant, pair.protocol, pair.reference, pair.reference_protocol) == wanted:
            return f"{sentence}: a difference of {_with_interval(pair.difference)} points."
    return f"{sentence}."


# --- what is shown -----------------------------------------------------------------------------------------------


def _headline(result: SuiteResult) -> Summary | None:
    """The smallest twin whose interval reaches the best twin's score."""
    twins = [one for one in result.summaries if one.kind == "twin"]
    if not twins:
        return None
    top = max(map(_best_value, twins))
    return min((one for one in twins if _best_protocol(one)[1].high >= top), key=lambda one: one.exclusive_ratio)


def _best_protocol(summary: Summary) -> tuple[Protocol, Interval]:
    """The score without a task ID if there is one, else with the head given."""
    if summary.normalized_routed is not None:
        return "routed", summary.normalized_routed
    return "oracle_head", summary.normalized_oracle_head


def _best_value(summary: Summary) -> float:
    return _best_protocol(summary)[1].value


def _protocols(result: SuiteResult) -> list[Protocol]:
    """The protocols that some contestant has a score in."""
    routed = any(one.normalized_routed is not None for one in result.summaries)
    return ["routed", "oracle_head"] if routed else ["oracle_head"]


def _routing_accuracy(summary: Summary) -> float | None:
    """Share of the test inputs sent to their own expert, mean over tasks."""
    if not summary.confusion:
        return None
    return fmean(row.get(task, 0) / sum(row.values()) for task, row in summary.confusion.items())


def _mean_routers(routers: Sequence[RouterResult]) -> list[RouterResult]:
    """Routers with equal settings, averaged over seeds; the reliability shown is the first seed's."""
    groups: dict[tuple[str, str, int], list[RouterResult]] = defaultdict(list)
    for one in routers:
        groups[one.features, one.method, one.inputs_per_expert].append(one)
    return [_mean_router(group) for group in groups.values()]


def _mean_router(group: Sequence[RouterResult]) -> RouterResult:
    held_out = [one.held_out_accuracy for one in group if one.held_out_accuracy is not None]
    return group[0].model_copy(
        update={
            "accuracy": fmean(one.accuracy for one in group),
            "held_out_accuracy": fmean(held_out) if held_out else None,
            "calibration_error": fmean(one.calibration_error for one in group),
            "nbytes": round(fmean(one.nbytes for one in group)),
            "seconds": fmean(one.seconds for one in group),
        }
    )


# --- rows of tables ----------------------------------------------------------------------------------------------

_MAIN_HEADINGS = ["contestant", "kind", "routed", "oracle head", "exclusive", "on disk", "ms/input"]
_ROUTER_HEADINGS = [
    "features",
    "method",
    "inputs/expert",
    "accuracy",
    "held out",
    "calibration error",
    "on disk",
    "seconds",
]


def _main_cells(one: Summary) -> list[str]:
    return [
        one.title,
        KIND_NAMES[one.kind],
        _MISSING if one.normalized_routed is None else _with_interval(one.normalized_routed),
        _with_interval(one.normalized_oracle_head),
        _times(one.exclusive_ratio),
        _size(sum(one.bytes.values())),
        _milliseconds(one.ms_per_input),
    ]


def _task_rows(result: SuiteResult, protocol: Protocol) -> Iterable[list[str]]:
    for one in result.summaries:
        if protocol == "oracle_head" or one.normalized_routed is not None:
            yield [one.title, *(_points(getattr(one.tasks[task], f"normalized_{protocol}")) for task in result.tasks)]
    if result.summaries:
        yield ["experts, raw score", *(_points(result.summaries[0].tasks[task].expert) for task in result.tasks)]


def _seed_rows(result: SuiteResult) -> Iterable[list[str]]:
    for one in result.summaries:
        for protocol, values in (("routed", one.routed_by_seed), ("oracle_head", one.oracle_head_by_seed)):
            if values:
                at = dict(zip(one.seeds, values, strict=True))
                yield [one.title, protocol.replace("_", " "), *(_points(at.get(seed)) for seed in result.seeds)]


def _comparison_rows(result: SuiteResult) -> Iterable[list[str]]:
    titles = {one.name: one.title for one in result.summaries}

    def named(name: str, protocol: Protocol) -> str:
        return f"{titles[name]} ({PROTOCOL_NAMES[protocol]})"

    for pair in result.comparisons:
        yield [
            named(pair.contestant, pair.protocol),
            named(pair.reference, pair.reference_protocol),
            _with_interval(pair.difference),
        ]


def _router_cells(router: RouterResult) -> list[str]:
    return [
        router.features,
        router.method,
        str(router.inputs_per_expert),
        _percent(router.accuracy),
        _percent(router.held_out_accuracy),
        f"{router.calibration_error:.3f}",
        _size(router.nbytes),
        f"{router.seconds:.1f}",
    ]


def _columns(rows: Mapping[str, Mapping[str, float] | Mapping[str, int]]) -> list[str]:
    """Every column that some row has, in order of appearance: a fall-back that few tasks see is one."""
    return list(dict.fromkeys(name for row in rows.values() for name in row))


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(headings), line(["---"] * len(headings)), *map(line, rows)])


# --- numbers as text ---------------------------------------------------------------------------------------------


def _points(value: float | None) -> str:
    return _MISSING if value is None else f"{100 * value:.1f}"


def _with_interval(one: Interval) -> str:
    return f"{_points(one.value)} [{_points(one.low)}, {_points(one.high)}]"


def _percent(value: float | None) -> str:
    return _MISSING if value is None else f"{_points(value)} %"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio >= 1 else f"{ratio:.3f}x" if ratio else "0x"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.1f} kB"


def _milliseconds(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.2f}"


def _cell(value: str | int | float | None) -> str:
    if value is None:
        return _MISSING
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- plots -------------------------------------------------------------------------------------------------------


def _score_axis(summaries: Sequence[Summary]) -> tuple[float, float]:
    """Ends of a common axis for the small interval bars of the main table."""
    shown = [
        interval for one in summaries for interval in (one.normalized_routed, one.normalized_oracle_head) if interval
    ]
    low, high = min(one.low for one in shown), max(1.0, *(one.high for one in shown))
    return low, high


def _plot_tasks(result: SuiteResult) -> str:
    """Normalized score by task of the best contestant of each kind."""
    best = [
        max((one for one in result.summaries if one.kind == kind), key=_best_value, default=None)
        for kind in KIND_NAMES
        if kind not in ("experts", "twin")
    ]
    shown = [one for one in [_headline(result), *best] if one is not None]
    described = [
        f"{one.title}: {', '.join(f'{task} {_points(_task_score(one, task))}' for task in result.tasks)}"
        for one in shown
    ]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.axvline(100, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for one in reversed(shown):
            axes.plot(
                [100 * _task_score(one, task) for task in result.tasks],
                range(len(result.tasks)),
                _MARKERS[one.kind],
                markersize=8,
                color=_KIND_COLOURS[one.kind],
                label=f"{one.title} ({PROTOCOL_NAMES[_best_protocol(one)[0]]})",
            )
        axes.set_yticks(range(len(result.tasks)), result.tasks)
        axes.set_ylim(len(result.tasks) - 0.5, -0.5)
        axes.set_xlabel("normalized score, 100 = the task's expert")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside upper left", fontsize=10)

    return _svg(
        draw, name="tasks", height=1.7 + 0.33 * len(result.tasks), title="Normalized score by task", described=described
    )


def _task_score(one: Summary, task: str) -> float:
    routed = one.tasks[task].normalized_routed
    return one.tasks[task].normalized_oracle_head if routed is None else routed


def _plot_bytes(result: SuiteResult) -> Markup:
    """Normalized score against exclusive bytes, both protocols; contestants without exclusive bytes at the left."""
    from markupsafe import Markup

    ratios = [one.exclusive_ratio for one in result.summaries if one.exclusive_ratio > 0]
    left = min(ratios, default=0.1) / 2.5
    described = [
        f"{one.title} at {_times(one.exclusive_ratio)}: "
        + ", ".join(f"{PROTOCOL_NAMES[protocol]} {_points(interval.value)}" for protocol, interval in _scores_of(one))
        for one in result.summaries
    ]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.axhline(100, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for index, one in reversed(list(enumerate(result.summaries))):
            for protocol, interval in _scores_of(one):
                _point(axes, one, protocol, interval, one.exclusive_ratio or left, f"contestant-{index}")
        ticks = [left, *(tick for tick in _RATIO_TICKS if left * 1.5 < tick <= max(ratios, default=0) * 1.3)]
        axes.set_xticks(ticks, ["none", *(f"{tick:g}x" for tick in ticks[1:])])
        axes.set_xticks([], minor=True)
        axes.set_xlim(left / 1.4, max([left * 2, *ratios]) * 1.4)
        axes.set_xlabel("exclusive bytes / bytes of the base model")
        axes.set_ylabel("normalized score")
        axes.grid()
        axes.set_axisbelow(True)
        _bytes_legend(figure, result)

    markup = _svg(draw, name="bytes", height=4.3, title="Normalized score against exclusive bytes", described=described)
    for index, text in enumerate(described):
        markup = markup.replace(
            Markup(f'<g id="plot-bytes-contestant-{index}">'), Markup("<g><title>{}</title>").format(text)
        )
    return markup


_RATIO_TICKS = [1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]


def _scores_of(one: Summary) -> list[tuple[Protocol, Interval]]:
    oracle: tuple[Protocol, Interval] = ("oracle_head", one.normalized_oracle_head)
    return [oracle] if one.normalized_routed is None else [("routed", one.normalized_routed), oracle]


def _point(axes: Axes, one: Summary, protocol: Protocol, interval: Interval, x: float, gid: str) -> None:
    axes.errorbar(
        [x],
        [100 * interval.value],
        yerr=[[100 * max(0, interval.value - interval.low)], [100 * max(0, interval.high - interval.value)]],
        fmt=_MARKERS[one.kind],
        color=_KIND_COLOURS[one.kind],
        markersize=7,
        markerfacecolor=_KIND_COLOURS[one.kind] if protocol == "routed" else _CARD,
        elinewidth=1,
        gid=gid,
    )


def _bytes_legend(figure: Figure, result: SuiteResult) -> None:
    from matplotlib.lines import Line2D

    kinds = [kind for kind in KIND_NAMES if any(one.kind == kind for one in result.summaries)]
    handles = [Line2D([], [], linestyle="", marker=_MARKERS[kind], color=_KIND_COLOURS[kind]) for kind in kinds]
    handles += [Line2D([], [], linestyle="", marker="o", color=_INK, markerfacecolor=face) for face in (_INK, "none")]
    names = [*(KIND_NAMES[kind] for kind in kinds), "routed", "oracle head"]
    figure.legend(handles, names, loc="outside upper left", ncols=4, fontsize=10, handletextpad=0.2, columnspacing=1)


def _plot_reliability(result: SuiteResult) -> str | None:
    """Confidence against accuracy of the most accurate router whose bins were recorded."""
    recorded = [one for one in result.routers if one.reliability]
    if not recorded:
        return None
    best = max(recorded, key=lambda one: one.accuracy)
    name = f"{best.method} on {best.features}, {best.inputs_per_expert} inputs per expert"
    described = [f"{name}: confidence {one.confidence:.2f}, accuracy {one.accuracy:.2f}" for one in best.reliability]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        confidence = [one.confidence for one in best.reliability]
        axes.plot(
            confidence, [one.accuracy for one in best.reliability], "o-", color=_KIND_COLOURS["twin"], markersize=6
        )
        axes.set(xlabel="confidence of the router", ylabel="share routed right", xlim=(0, 1.02), ylim=(0, 1.02))
        axes.grid()
        axes.set_title(name, fontsize=10, loc="left")

    return _svg(draw, name="calibration", height=3.8, title="Calibration of the router", described=described)


def _svg(draw: Callable[[Figure], None], *, name: str, height: float, title: str, described: Sequence[str]) -> Markup:
    """A plot as inline SVG markup: colours are CSS variables, ids start with the name, content in words for readers."""
    from markupsafe import Markup, escape
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({**_PLOT_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_PLOT_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    markup = drawn.getvalue()
    markup = re.sub(r"<metadata>.*?</metadata>", "", markup[markup.index("<svg") :], flags=re.DOTALL)
    markup = re.sub(r"font-family: [^;\"]*", "font-family: inherit", markup)
    markup = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--font)", markup)
    markup = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>plot-{name}-", markup)
    for colour, variable in _CSS_COLOURS.items():
        markup = markup.replace(colour, variable)
    text = escape(f"{title}. {'; '.join(described)}.")
    body = markup[markup.index(">") + 1 :]
    return Markup(f'<svg role="img" aria-label="{text}" viewBox="0 0 {72 * _PLOT_WIDTH:g} {72 * height:g}">{body}')
