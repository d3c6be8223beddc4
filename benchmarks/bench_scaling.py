"""Which scaling of the shared expert leaves the best truncated twin: `auto`, 0.3 (the paper) or 1/T (the mean)?

Expected: `auto` has the least residual energy at every rank, and the difference shrinks as the rank grows.

    python benchmarks/bench_scaling.py [--suite suites/text/text8.yaml] [--seed 0] [--rows 400]

For ranks 1, 4, 16 and two budgets every expert is decomposed against each shared expert. Residual energy is what
truncation throws away, sum over experts and matrices of ||D - D_r||_F^2, relative to that of the mean; the score is the
normalized score with given gates and heads on validation rows (test rows are not touched).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from twinmerge.eval.metrics import normalized_score, score
from twinmerge.eval.seed import SeedRun
from twinmerge.eval.suite import Suite
from twinmerge.files.progress import silent
from twinmerge.hf.loading import load_backbone
from twinmerge.merging.average import Average
from twinmerge.merging.method import Method
from twinmerge.merging.task_arithmetic import TaskArithmetic
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.twin.decompose import write_weights
from twinmerge.twin.recipe import ExclusiveSettings

SHARED: dict[str, Method] = {
    "1/T": Average(),
    "0.3": TaskArithmetic(scaling=0.3),
    "auto": TaskArithmetic(scaling="auto"),
}
KEPT = {
    "rank 1": ExclusiveSettings(rank=1),
    "rank 4": ExclusiveSettings(rank=4),
    "rank 16": ExclusiveSettings(rank=16),
    "budget 0.06": ExclusiveSettings(budget=0.06, dtype="float8_e4m3fn"),
    "budget 0.12": ExclusiveSettings(budget=0.12, dtype="float8_e4m3fn"),
}


def main() -> None:
    """Decompose, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, default=Path("suites/text/text8.yaml"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=400, help="validation rows of each task")
    options = parser.parse_args()
    at = SeedRun(Suite.load(options.suite), options.seed, silent)
    expert_scores = {}
    for name in at.tasks:
        model = at.model(load_backbone(at.plan.experts[name].checkpoint.path, like=at.plan.base.path))
        expert_scores[name] = _score(at, model, name, options.rows, None)
    found = [_measure(at, kept, label, expert_scores, options.rows) for kept in KEPT for label in SHARED]
    table = Table(title="scaling of the shared expert, seed " + str(options.seed))
    for column in ("kept", "scaling", "residual energy", "relative to 1/T", "mean lambda", "normalized score x100"):
        table.add_column(column, justify="right")
    for one in found:
        mean = next(o["residual"] for o in found if o["kept"] == one["kept"] and o["scaling"] == "1/T")
        one["relative"] = one["residual"] / mean
        cells = (
            f"{one['residual']:.3f}",
            f"{one['relative']:.4f}",
            f"{one['lambda']:.3f}",
            f"{100 * one['score']:.2f}",
        )
        table.add_row(one["kept"], one["scaling"], *cells)
    Console().print(table)
    sys.stdout.write(
        json.dumps({"benchmark": "scaling", "seed": options.seed, "rows": options.rows, "found": found}) + "\n"
    )


def _measure(at: SeedRun, kept: str, label: str, expert_scores: dict[str, float], rows: int) -> dict[str, Any]:
    plan = at.plan_for(SHARED[label], KEPT[kept])
    with tempfile.TemporaryDirectory() as folder:
        work, target = Path(folder, "work"), Path(folder, "twin")
        work.mkdir()
        target.mkdir()
        report = write_weights(plan, target, work)
        artifact = TwinArtifact(target, {"experts": report.experts, "tensors": report.tensors, "files": {}})
        parts = {name: artifact.exclusive(name) for name in artifact.expert_names}
        model = at.model(load_backbone(target), parts, artifact.kinds)
    residual = sum(entry["energy"] * (1 - entry["energy_kept"]) for entry in report.experts.values())
    scalings = [entry["scaling"] for entry in report.tensors.values() if entry["scaling"] is not None]
    scores = {name: _score(at, model, name, rows, name) for name in at.tasks}
    return {
        "kept": kept,
        "scaling": label,
        "residual": residual,
        "lambda": float(np.mean(scalings)) if scalings else 1 / len(at.tasks),
        "score": normalized_score(scores, expert_scores),
    }


def _score(at: SeedRun, model: Any, name: str, rows: int, expert: str | None) -> float:
    task = at.tasks[name]
    picked = task.validation[:rows]
    gates = None if expert is None else model.one_hot([expert] * len(picked))
    answers = at.answers(model, picked, gates, [name] * len(picked), name)
    return score(task.metric, [row["label"] for row in picked], answers, task.positive_label)


if __name__ == "__main__":
    main()
