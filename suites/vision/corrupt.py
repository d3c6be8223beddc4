"""Asks a twin, its shared expert and its base about pictures that were made worse.

    python -m suites.vision.corrupt suites/vision/lite0.yaml --contestant twin_040 --rows 100

How far do noise, blur, coarse pixels and lost contrast take the router and the experts' parts? Expected: a twin is no
worse than the better of its shared expert and its base. Scores are per cent of the experts' own on the same pictures as
they were. A table for people goes to stderr, one JSON line to stdout.
"""

import argparse
import base64
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from rich.console import Console
from rich.table import Table

from suites.vision.data import PIXELS
from twinmerge.eval.seed import ANY_ROUTER, SeedRun, inputs_of
from twinmerge.eval.suite import Suite
from twinmerge.files.progress import silent
from twinmerge.files.rows import Row
from twinmerge.hf.images import open_image
from twinmerge.jobs.predict import predict
from twinmerge.jobs.tune import NEXT_TO_NOTHING
from twinmerge.merging.average import Pretrained

Corruption = Callable[[Image.Image, float, np.random.Generator], Image.Image]


def noise(image: Image.Image, strength: float, draw: np.random.Generator) -> Image.Image:
    """Gaussian noise; strength is its standard deviation as a share of white."""
    pixels = np.asarray(image, np.float64)
    return Image.fromarray((pixels + draw.normal(0, 255 * strength, pixels.shape)).clip(0, 255).astype(np.uint8))


def blur(image: Image.Image, strength: float, draw: np.random.Generator) -> Image.Image:
    """Gaussian blur; strength is its standard deviation in pixels."""
    return image.filter(ImageFilter.GaussianBlur(strength))


def pixelate(image: Image.Image, strength: float, draw: np.random.Generator) -> Image.Image:
    """Coarse pixels, of so many pixels a side."""
    side = round(image.width / strength)
    return image.resize((side, side), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


def contrast(image: Image.Image, strength: float, draw: np.random.Generator) -> Image.Image:
    """Less contrast; strength is the share that is left."""
    return ImageEnhance.Contrast(image).enhance(strength)


CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "noise": (noise, (0.05, 0.1, 0.2)),
    "blur": (blur, (1.0, 2.0, 3.0)),
    "pixels": (pixelate, (2.0, 4.0, 8.0)),
    "contrast": (contrast, (0.6, 0.4, 0.2)),
}


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--contestant", required=True, help="a twin of the suite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=100, help="test rows of each task (default 100)")
    options = parser.parse_args()
    suite = Suite.load(options.suite).model_copy(update={"test_rows": options.rows, "unseen": {}})
    spec = suite.contestants[options.contestant]
    if spec.exclusive is None:
        parser.error(f"--contestant must be a twin of the suite, found {options.contestant}")
    at = SeedRun(suite, options.seed, silent)
    at.require_labels()
    twin = at.build(spec.shared, spec.exclusive, spec.router).model
    base = at.build(Pretrained(), NEXT_TO_NOTHING, ANY_ROUTER).model
    truth, heads = [row["label"] for _, row in at.test], [name for name, _ in at.test]
    experts = {name: _share(at.expert_answers[name], [row["label"] for row in t.test]) for name, t in at.tasks.items()}

    def normalized(found: Sequence[str]) -> float:
        right = {name: [found[i] == truth[i] for i in range(len(truth)) if heads[i] == name] for name in experts}
        return 100 * fmean(fmean(right[name]) / experts[name] for name in experts)

    console = Console(stderr=True)
    names = ("twin", "shared", "base")
    columns = [f"{who}, {how}" for how in ("routed", "oracle head") for who in names]
    table, lines = Table("corruption", "strength", "right expert", *columns), []
    variants = [("none", 0.0)] + [(name, s) for name, (_, strengths) in CORRUPTIONS.items() for s in strengths]
    for name, strength in variants:
        rows = [corrupted(row, name, strength, number) for number, (_, row) in enumerate(at.test)]
        answers = list(predict(twin, inputs_of(rows)))
        chosen = [answer["expert"] for answer in answers]
        gate = twin_gates(answers)
        oracle = {
            "twin": at.answers(twin, rows, gate, heads, None),
            "shared": at.answers(twin, rows, None, heads, None),
            "base": at.answers(base, rows, None, heads, None),
        }
        routed = {
            who: [a if c == h else "" for a, c, h in zip(oracle[who], chosen, heads, strict=True)] for who in names
        }
        scores = [normalized(by[who]) for by in (routed, oracle) for who in names]
        right = 100 * _share(chosen, heads)
        table.add_row(name, f"{strength:g}", f"{right:.1f}", *(f"{score:.1f}" for score in scores))
        lines.append(
            {"corruption": name, "strength": strength, "right_expert": right, **dict(zip(columns, scores, strict=True))}
        )
        console.print(f"{name} {strength:g}: {', '.join(f'{score:.1f}' for score in scores)}", highlight=False)
    console.print(table)
    told = {"suite": suite.name, "contestant": options.contestant, "seed": options.seed, "rows": options.rows}
    sys.stdout.write(json.dumps({**told, "scores": lines}) + "\n")
    return 0


def corrupted(row: Row, name: str, strength: float, number: int) -> Row:
    """A row whose picture was made worse; the same row, corruption and strength give the same picture."""
    image = open_image(row["image"]).resize((PIXELS, PIXELS), Image.Resampling.BILINEAR)
    if name != "none":
        draw = np.random.default_rng([number, round(1000 * strength)])
        image = CORRUPTIONS[name][0](image, strength, draw)
    stream = io.BytesIO()
    image.save(stream, "png")
    return {**row, "image": "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()}


def twin_gates(answers: Sequence[Row]) -> torch.Tensor:
    """(row, expert), as answers say them."""
    return torch.tensor([list(answer["gate"].values()) for answer in answers])


def _share(found: Sequence[str], truth: Sequence[str]) -> float:
    return fmean(a == b for a, b in zip(found, truth, strict=True))


if __name__ == "__main__":
    sys.exit(main())
