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
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from twinmerge.eval.metrics import normalized_score, score
from twinmerge.eval.seed import ANY_ROUTER, SeedRun
from twinmerge.eval.suite import Suite
from twinmerge.files.progress import silent
from twinmerge.jobs.tune import NEXT_TO_NOTHING
from twinmerge.merging.average import Average
from twinmerge.merging.method import Method
from twinmerge.merging.task_arithmetic import TaskArithmetic
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
    heads = at.build(at.suite.shared, NEXT_TO_NOTHING, ANY_ROUTER).model
    for name in at.tasks:
        expert_scores[name] = _score(at, heads, name, options.rows, at.body(name))
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
    built = at.build(SHARED[label], KEPT[kept], ANY_ROUTER)
    residual = sum(entry.energy * (1 - entry.energy_kept) for entry in built.manifest.experts.values())
    scalings = [entry.scaling for entry in built.manifest.tensors.values() if entry.scaling is not None]
    scores = {name: _score(at, built.model, name, rows) for name in at.tasks}
    return {
        "kept": kept,
        "scaling": label,
        "residual": residual,
        "lambda": float(np.mean(scalings)) if scalings else 1 / len(at.tasks),
        "score": normalized_score(scores, expert_scores),
    }


def _score(at: SeedRun, model: Any, name: str, rows: int, body: Any = None) -> float:
    """Under the gate of the task's expert, or by the full expert's body."""
    task = at.tasks[name]
    picked = task.validation[:rows]
    names = [name] * len(picked)
    answers = at.answers(model, picked, model.one_hot(names), names, name, body)
    return score(task.spec.metric, [row["label"] for row in picked], answers, task.spec.positive_label)


if __name__ == "__main__":
    main()
