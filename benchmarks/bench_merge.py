"""How much work is a static merge, against mergekit 0.1.5 on the same recipe and the same checkpoints?

Expected: at most half of mergekit's CPU seconds for linear methods, 0.15 for TIES, 0.35 for DARE; memory that does not
grow with the model; at least 99.99 % of the output the correctly rounded result. Both programs run as their users run
them, whole command, in turns; CPU seconds (user and system) and peak memory are the kernel's figures for the child.
First, on a small model, both results in float32 are compared: equal to float32's rounding where the definition is the
same; TIES differs where magnitudes equal the threshold, and random draws are each program's own.
Prints a table and one JSON line last.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from twinmerge.files.checkpoint import Checkpoint
from twinmerge.tensors.sparse import drop_mask

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.make_checkpoints import make

CACHE = Path.home() / ".cache" / "twinmerge"
MERGEKIT = ("mergekit==0.1.5", "torch==2.13.0")
METHODS = ("linear", "task_arithmetic", "ties", "dare_linear")
EQUAL = {"linear", "task_arithmetic", "ties"}
EXACT = {"linear", "task_arithmetic", "dare_linear"}  # whose exact result is computed here
WEIGHT, DENSITY, EXPERTS = 0.3, 0.2, 4


def main() -> None:
    """Run the comparison and print it."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--size", default="120m")
    options.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    options.add_argument("--pairs", type=int, default=5, help="runs of each program and method, in turns")
    options.add_argument("--ours-only", action="store_true", help="without mergekit: figures of twinmerge alone")
    options.add_argument("--models", type=Path, default=CACHE / "bench", help="where checkpoints are, or are made")
    options.add_argument("--out", type=Path, help="where results are written and removed (default: beside the models)")
    options.add_argument("--no-equality", action="store_true", help="without the comparison of float32 results")
    chosen = options.parse_args()
    models = make(chosen.models, chosen.size)
    out = chosen.out or models.parent
    rows: list[dict[str, Any]] = []
    equality = []
    compared = [] if chosen.ours_only or chosen.no_equality else [m for m in chosen.methods if m in EQUAL]
    for method in compared:
        equality.append(differences(method, make(chosen.models, "8m"), out))
        print(
            "{method:16} float32: largest difference {largest:.2g}, {share:.4%} of entries differ".format(
                **equality[-1]
            )
        )
    for method in chosen.methods:
        rows.append(compare(method, models, out, chosen.pairs, ours_only=chosen.ours_only))
        print(_line(rows[-1]), flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(
        json.dumps(
            {
                "benchmark": "merge",
                "size": chosen.size,
                "experts": EXPERTS,
                "dtype": "bfloat16",
                "density": DENSITY,
                "commit": commit.stdout.strip(),
                "versions": {"torch": torch.__version__, "mergekit": MERGEKIT[0]},
                "cores": len(os.sched_getaffinity(0)),
                "load": os.getloadavg()[0],
                "equality": equality,
                "rows": rows,
            }
        )
    )


def differences(method: str, models: Path, out: Path) -> dict[str, Any]:
    """How the two programs' float32 results of one recipe differ."""
    with tempfile.TemporaryDirectory(dir=out) as work:
        recipe, ours, theirs = Path(work, "recipe.yaml"), Path(work, "ours"), Path(work, "theirs")
        recipe.write_text(_recipe(method, models, "float32"), encoding="utf-8")
        measure(_own(recipe, ours))
        measure([str(mergekit()), str(recipe), str(theirs)])
        first, second = Checkpoint.open(ours), Checkpoint.open(theirs)
        apart = torch.cat([(first.read(name) - second.read(name)).abs().flatten() for name in first.specs])
    return {"method": method, "largest": float(apart.max()), "share": float((apart > 0).double().mean())}


def compare(method: str, models: Path, out: Path, pairs: int, *, ours_only: bool) -> dict[str, Any]:
    """One method: `pairs` runs of each program in turns; the last outputs are checked."""
    with tempfile.TemporaryDirectory(dir=out) as work:
        recipe, ours, theirs = Path(work, "recipe.yaml"), Path(work, "ours"), Path(work, "theirs")
        recipe.write_text(_recipe(method, models), encoding="utf-8")
        own = _own(recipe, ours)
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
        for _ in range(pairs):
            shutil.rmtree(ours, ignore_errors=True)
            runs["ours"].append(measure(own))
            if not ours_only:
                shutil.rmtree(theirs, ignore_errors=True)
                runs["theirs"].append(measure([str(mergekit()), str(recipe), str(theirs)]))
        share = rounded_share(method, models, ours) if method in EXACT else None
        same = method in EXACT - {"dare_linear"} and runs["theirs"]  # their draws are others
        their_share = rounded_share(method, models, theirs) if same else None
    result: dict[str, Any] = {"method": method, "pairs": pairs, "correctly_rounded": share}
    for who, measured in runs.items():
        if measured:
            result[who] = {key: statistics.median(run[key] for run in measured) for key in measured[0]}
    if runs["theirs"]:
        ratios = [a["cpu_s"] / b["cpu_s"] for a, b in zip(runs["ours"], runs["theirs"], strict=True)]
        result |= {"cpu_ratio": statistics.median(ratios), "cpu_ratios": ratios, "mergekit_rounded": their_share}
    return result


def _own(recipe: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "twinmerge", "merge", str(recipe), "--out", str(out)]


_LAUNCHER = """
import json, os, resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=2)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
"""


def measure(command: list[str]) -> dict[str, float]:
    """CPU seconds, wall seconds and peak memory of a command.

    It is started by a small process, because the kernel counts a child's peak memory from its parent's.
    """
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _LAUNCHER, *command],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    code, cpu, peak = json.loads(done.stdout)
    if code:
        sys.exit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return {"cpu_s": cpu, "wall_s": time.perf_counter() - start, "peak_mb": peak * 1024 / 1e6}


def rounded_share(method: str, models: Path, merged: Path) -> float:
    """Share of the output's entries that are the bfloat16 nearest to the float64 result."""
    result, base = Checkpoint.open(merged), Checkpoint.open(models / "base")
    experts = [Checkpoint.open(models / f"expert{i}") for i in range(EXPERTS)]
    right = total = 0
    for name in result.specs:
        start = base.read(name).double()
        models_read = torch.stack([expert.read(name).double() for expert in experts])
        change = models_read - start
        if method == "dare_linear":
            draws = [drop_mask(start.numel(), DENSITY, 0, str(expert.path), name) for expert in experts]
            change = change.where(~torch.stack(draws).view(change.shape), 0.0) / DENSITY
        exact = models_read.sum(0) / EXPERTS if method == "linear" else start + WEIGHT * change.sum(0)
        right += int(_is_nearest(result.read(name), exact).sum())
        total += exact.numel()
    return right / total


def _is_nearest(rounded: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Whether each bfloat16 is nearest to the exact value, to the even one of two equally near."""
    bits, own = rounded.view(torch.int16), (rounded.double() - exact).abs()
    nearest = torch.ones_like(own, dtype=torch.bool)
    for step in (-1, 1):
        other = ((bits + step).view(torch.bfloat16).double() - exact).abs()
        nearest &= (own < other) | ((own == other) & (bits % 2 == 0)) | other.isnan()
    return nearest


def mergekit() -> Path:
    """Find mergekit in an environment of its own, made on first use; `MERGEKIT_VENV` names another."""
    home = Path(os.environ.get("MERGEKIT_VENV", CACHE / "mergekit-venv"))
    program = home / "bin" / "mergekit-yaml"
    if not program.exists():
        venv.create(home, with_pip=True)
        subprocess.run([home / "bin" / "pip", "install", "--quiet", *MERGEKIT], check=True)
    return program


def _recipe(method: str, models: Path, dtype: str = "bfloat16") -> str:
    lines = (
        [f"merge_method: {method}", f"base_model: {models}/base"] if method != "linear" else ["merge_method: linear"]
    )
    weight = 1 / EXPERTS if method == "linear" else WEIGHT
    parameters = f"weight: {weight}" + (f", density: {DENSITY}" if method in ("ties", "dare_linear") else "")
    return "\n".join([*lines, "models:", *_models(models, parameters), f"dtype: {dtype}", ""])


def _models(models: Path, parameters: str) -> Iterator[str]:
    for number in range(EXPERTS):
        yield f"  - model: {models}/expert{number}"
        yield f"    parameters: {{{parameters}}}"


def _line(row: dict[str, Any]) -> str:
    parts = [f"{row['method']:16}"]
    for who in ("ours", "theirs"):
        if who in row:
            parts.append("{cpu_s:7.1f} CPU s {wall_s:7.1f} s {peak_mb:6.0f} MB".format(**row[who]))
    if "cpu_ratio" in row:
        parts.append(f"ratio {row['cpu_ratio']:.3f}")
    if row["correctly_rounded"] is not None:
        parts.append(f"rounded right {row['correctly_rounded']:.6f}")
    if row.get("mergekit_rounded") is not None:
        parts.append(f"(mergekit {row['mergekit_rounded']:.6f})")
    return " | ".join(parts)


if __name__ == "__main__":
    main()
