"""How does the cost of a mixed batch change with experts, rank, batch and length, and what would the machine allow?

Draws the curves that `bench_inference.py --cases curves --json FILE` measured, with the roofline: the ratio if every
product ran at the machine's measured peak or, if that takes longer, its bytes at the measured bandwidth.

    python benchmarks/plot_inference.py docs/img/inference.json docs/img/inference.svg
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

TITLES = {
    "experts": "experts (T)",
    "rank": "rank",
    "batch": "rows of 64 tokens",
    "length": "tokens a row, 8 rows",
}


def draw(record: dict[str, Any]) -> Figure:
    """Four panels, one a curve."""
    curves = record["results"]["curves"]
    figure = Figure(figsize=(8.4, 5.6), layout="constrained")
    FigureCanvasSVG(figure)
    for axis, (name, title) in zip(figure.subplots(2, 2).flat, TITLES.items(), strict=True):
        points = curves[name]
        values, ratios = [p["value"] for p in points], [p["ratio"] for p in points]
        below = [p["ratio"] - p["quartiles"][0] for p in points]
        over = [p["quartiles"][1] - p["ratio"] for p in points]
        axis.errorbar(values, ratios, [below, over], marker="o", capsize=3, label="measured")
        axis.plot(values, [p["bound_ratio"] for p in points], "--", label="roofline")
        counted = [p["flops"]["twin"] / p["flops"]["static"] for p in points]
        axis.plot(values, counted, ":", label="FLOPs counted")
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, [str(value) for value in values])
        axis.set_xlabel(title)
        axis.set_ylabel("time / static model")
        axis.set_ylim(bottom=1.0)
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    peak, bandwidth = curves["peak_flops"] / 1e9, curves["bandwidth_bytes"] / 1e9
    figure.suptitle(
        f"MiniLM float32, one expert a row; {record['threads']} threads, {record['clock']} clock; "
        f"measured peaks {peak:.0f} GFLOP/s, {bandwidth:.0f} GB/s"
    )
    return figure


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="what bench_inference.py --json wrote")
    parser.add_argument("image", type=Path, help="an .svg file")
    options = parser.parse_args()
    record = json.loads(options.record.read_text(encoding="utf-8"))
    with rc_context({"svg.hashsalt": "inference", "font.size": 9}):
        draw(record).savefig(options.image, metadata={"Date": None})


if __name__ == "__main__":
    main()
