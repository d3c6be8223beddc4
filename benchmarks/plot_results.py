"""What does a twin keep for its bytes? Draws the landing page's picture from the tables of docs/results.md.

A contestant that stands in several tables is taken from the first, which is of today's defaults.

python benchmarks/plot_results.py docs/results.md docs/img/results.svg
"""

import argparse
import re
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

SHOWN = {
    "weight average": "weight average",
    "task arithmetic": "task arithmetic",
    "twin, budget 0.06x": "twin, 6 % of a model's bytes more",
    "router top-1 on full experts": "router and eight full experts, 800 %",
}
"""Contestants in the tables, and what the picture calls them."""
_ROW = re.compile(r"^\| ([^|]+) \| [^|]+ \| ([\d.]+) \[([\d.]+), ([\d.]+)\] \|", re.MULTILINE)


def scores(page: str) -> dict[str, tuple[float, float, float]]:
    """Routed score and interval by contestant of the suite text8, whose tables are two blocks of the page."""
    found: dict[str, tuple[float, float, float]] = {}
    for block in ("defaults", "tables"):
        _, _, rest = page.partition(f"<!-- generated: {block} -->")
        for name, score, low, high in _ROW.findall(rest.partition("<!-- end of generated -->")[0]):
            found.setdefault(name, (float(score), float(low), float(high)))
    return found


def draw(found: dict[str, tuple[float, float, float]]) -> Figure:
    """One line a contestant: score and interval."""
    figure = Figure(figsize=(7.6, 2.5), layout="constrained")
    FigureCanvasSVG(figure)
    axis = figure.add_subplot()
    for place, name in enumerate(SHOWN):
        score, low, high = found[name]
        colour = "#0b7a57" if name.startswith("twin") else "#64707f"
        axis.errorbar(score, place, xerr=[[score - low], [high - score]], fmt="o", color=colour, capsize=3)
        axis.text(high + 0.3, place, f"{score:.1f}", va="center", fontsize=9)
    axis.set_yticks(range(len(SHOWN)), list(SHOWN.values()), fontsize=9)
    axis.set_ylim(len(SHOWN) - 0.5, -0.5)
    axis.set_xlim(87, 100.6)
    axis.axvline(100, color="#64707f", linewidth=1, linestyle=(0, (4, 3)))
    axis.set_xlabel("quality kept on eight tasks, no task ID given; 100 = each expert on its own task", fontsize=9)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    return figure


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="docs/results.md")
    parser.add_argument("image", type=Path, help="an .svg file")
    options = parser.parse_args()
    with rc_context({"svg.hashsalt": "results", "svg.fonttype": "none", "font.family": "sans-serif"}):
        draw(scores(options.page.read_text(encoding="utf-8"))).savefig(options.image, metadata={"Date": None})


if __name__ == "__main__":
    main()
