"""Draws results as inline SVG that follows the page's colours: scores by task, scores against bytes, calibration."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from twinmerge.eval.results import Interval, Kind, Protocol, SuiteResult, Summary
from twinmerge.report.tables import (
    KIND_NAMES,
    PROTOCOL_NAMES,
    best_protocol,
    best_value,
    headline,
    points,
    times,
)

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def score_axis(summaries: Sequence[Summary]) -> tuple[float, float]:
    """Ends of a common axis for the small interval bars of the main table."""
    shown = [
        interval for one in summaries for interval in (one.normalized_routed, one.normalized_oracle_head) if interval
    ]
    low, high = min(one.low for one in shown), max(1.0, *(one.high for one in shown))
    return low, high


def plot_tasks(result: SuiteResult) -> str:
    """Normalized score by task of the best contestant of each kind."""
    best = [
        max((one for one in result.summaries if one.kind == kind), key=best_value, default=None)
        for kind in KIND_NAMES
        if kind not in ("experts", "twin")
    ]
    shown = [one for one in [headline(result), *best] if one is not None]
    described = [
        f"{one.title}: {', '.join(f'{task} {points(_task_score(one, task))}' for task in result.tasks)}"
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
                label=f"{one.title} ({PROTOCOL_NAMES[best_protocol(one)[0]]})",
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


def plot_bytes(result: SuiteResult) -> Markup:
    """Normalized score against exclusive bytes, both protocols; contestants without exclusive bytes at the left."""
    from markupsafe import Markup

    ratios = [one.exclusive_ratio for one in result.summaries if one.exclusive_ratio > 0]
    left = min(ratios, default=0.1) / 2.5
    described = [
        f"{one.title} at {times(one.exclusive_ratio)}: "
        + ", ".join(f"{PROTOCOL_NAMES[protocol]} {points(interval.value)}" for protocol, interval in _scores_of(one))
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


def plot_reliability(result: SuiteResult) -> str | None:
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
