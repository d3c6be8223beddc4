"""Metrics, the normalized score and its bootstrap, in plain numpy.

Every metric is computed from distinct (label, prediction) pairs with weights, never from rows. A bootstrap
resample is then one multinomial draw over the distinct tuples of (label, prediction of each predictor): the
same resample scores every predictor, and the order of the rows cannot matter.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from twinmerge.errors import DataError

MISROUTED: Final = "\x00misrouted"
"""The prediction of a row that another task's head answered: no label can equal it."""

CONFIDENCE: Final = 0.95
"""Share of the resamples that an interval holds."""

RESAMPLES: Final = 1000
"""Bootstrap resamples, unless the caller says otherwise."""


class ReliabilityBin(NamedTuple):
    """Inputs whose confidence falls in one bin."""

    confidence: float
    """Mean confidence of these inputs, 0 to 1."""
    accuracy: float
    """Share of them answered right."""
    rows: int
    """How many they are."""


def score(metric: str, labels: Sequence[str], predicted: Sequence[str], positive_label: str | None = None) -> float:
    """A metric of predictions.

    Args:
        metric: a name in `METRICS`.
        labels: true labels.
        predicted: predictions in the same order; `MISROUTED` is always wrong.
        positive_label: the class that `f1` is about.

    Returns:
        The score, 0 to 1.

    Raises:
        DataError: if the metric is unknown, `f1` has no positive label, there are no rows, or the lengths differ.
    """
    table = _tabulate(labels, [predicted])
    return float(_scores(metric, table, table.counts[None, :].astype(np.float64), positive_label)[0, 0])


def bootstrap(
    metric: str,
    labels: Sequence[str],
    predictors: Sequence[Sequence[str]],
    *,
    positive_label: str | None = None,
    resamples: int = RESAMPLES,
    seed: Sequence[int] = (0,),
) -> Float64[np.ndarray, "predictor resample"]:
    """Scores of several predictors on the same resamples of one task's rows.

    Args:
        metric: a name in `METRICS`.
        labels: true labels.
        predictors: for each predictor its predictions, in the order of `labels`.
        positive_label: the class that `f1` is about.
        resamples: how often as many rows as there are get drawn, with replacement.
        seed: what the draws depend on; rows in another order give the same scores.

    Returns:
        Scores, 0 to 1; column r scores all predictors on the same rows.

    Raises:
        DataError: as `score`.
    """
    table = _tabulate(labels, predictors)
    rows = int(table.counts.sum())
    weights = np.random.default_rng(seed).multinomial(rows, table.counts / rows, size=resamples)
    return _scores(metric, table, weights.astype(np.float64), positive_label)


def normalized_score(scores: Mapping[str, float], expert_scores: Mapping[str, float]) -> float:
    """Mean over tasks of a score as a share of the expert's own (METHOD §6).

    Args:
        scores: a contestant's score by task.
        expert_scores: each task's expert, same rows and metric.

    Returns:
        1.0 where the contestant is as good as the experts; tables show it times 100.

    Raises:
        DataError: if the tasks differ, there are none, or an expert's score is not above 0.
    """
    if not scores or scores.keys() != expert_scores.keys():
        raise DataError(f"a score needs its expert's: tasks are {sorted(scores)}, experts' {sorted(expert_scores)}")
    for task, expert_score in expert_scores.items():
        if not expert_score > 0:
            raise DataError(f"the expert of task {task!r} scores {expert_score:g}: nothing can be normalized by that")
    return float(np.mean([scores[task] / expert_scores[task] for task in sorted(scores)]))


def percentile_interval(samples: Float64[np.ndarray, " resample"]) -> tuple[float, float]:
    """The middle 95 % of bootstrap samples.

    Args:
        samples: one value a resample; NaN where a resample gives none (an expert without a
            right answer in it), which is left out.

    Returns:
        The interval's two ends.

    Raises:
        DataError: if no resample gives a value.
    """
    defined = samples[~np.isnan(samples)]
    if not defined.size:
        raise DataError("no bootstrap resample gives a score: an expert is hardly ever right")
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def mask_misrouted(predicted: Sequence[str], chosen: Sequence[str | None], expert: str) -> list[str]:
    """Predictions of the routed protocol: a row whose head was another expert's has no valid answer.

    Args:
        predicted: predictions of the task's own head.
        chosen: the expert whose head the router picked, None for the fall-back.
        expert: the task's own expert.

    Returns:
        The predictions, `MISROUTED` where another head was picked.
    """
    return [label if name == expert else MISROUTED for label, name in zip(predicted, chosen, strict=True)]


def reliability(
    confidence: Float64[np.ndarray, " row"], correct: Bool[np.ndarray, " row"], bins: int = 15
) -> list[ReliabilityBin]:
    """Mean confidence against accuracy, in bins of equal width over [0, 1].

    Args:
        confidence: probability given to the answer, 0 to 1.
        correct: whether the answer was right.
        bins: how many there are; only those with rows are returned.

    Returns:
        The bins in ascending order of confidence.

    Raises:
        DataError: if there are no rows or a confidence is outside [0, 1].
    """
    if not confidence.size:
        raise DataError("no confidences: calibration needs at least one row")
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise DataError(f"a confidence must lie in [0, 1]; found {confidence.min():g} to {confidence.max():g}")
    index = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    members = [index == bin_index for bin_index in np.unique(index)]
    return [
        ReliabilityBin(float(confidence[here].mean()), float(correct[here].mean()), int(here.sum())) for here in members
    ]


class _Table(NamedTuple):
    """Distinct (label, predictions) tuples and how many rows have each."""

    classes: list[str]
    labels: Int64[np.ndarray, " cell"]
    predictors: Int64[np.ndarray, "predictor cell"]
    counts: Int64[np.ndarray, " cell"]


def _tabulate(labels: Sequence[str], predictors: Sequence[Sequence[str]]) -> _Table:
    lengths = {len(predicted) for predicted in predictors}
    if not labels or lengths != {len(labels)}:
        raise DataError(f"{sorted(lengths)} predictions for {len(labels)} labels: need as many, and at least one")
    rows = Counter(zip(labels, *predictors, strict=True))
    cells = sorted(rows)
    classes = sorted({name for cell in cells for name in cell})
    code = {name: index for index, name in enumerate(classes)}
    codes = np.array([[code[name] for name in cell] for cell in cells], dtype=np.int64).T
    counts = np.array([rows[cell] for cell in cells], dtype=np.int64)
    return _Table(classes, codes[0], codes[1:], counts)


def _scores(
    metric: str, table: _Table, weights: Float64[np.ndarray, "resample cell"], positive_label: str | None
) -> Float64[np.ndarray, "predictor resample"]:
    if metric not in METRICS:
        raise DataError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
    if metric == "f1" and positive_label is None:
        raise DataError("metric 'f1' needs the positive label")
    positive = table.classes.index(positive_label) if positive_label in table.classes else -1
    function = METRICS[metric]
    return np.stack([function(table.labels, predicted, weights, positive) for predicted in table.predictors])


def _accuracy(
    labels: Int64[np.ndarray, " cell"],
    predicted: Int64[np.ndarray, " cell"],
    weights: Float64[np.ndarray, "resample cell"],
    positive: int,
) -> Float64[np.ndarray, " resample"]:
    """Share of the rows answered right."""
    right = weights @ (labels == predicted).astype(np.float64)
    return np.asarray(right / weights.sum(axis=1))


def _f1(
    labels: Int64[np.ndarray, " cell"],
    predicted: Int64[np.ndarray, " cell"],
    weights: Float64[np.ndarray, "resample cell"],
    positive: int,
) -> Float64[np.ndarray, " resample"]:
    """F1 of the positive class; 0 where it is neither there nor predicted."""
    is_label, is_predicted = labels == positive, predicted == positive
    hits = weights @ (is_label & is_predicted).astype(np.float64)
    total = weights @ (is_label.astype(np.float64) + is_predicted)
    return _ratio(2 * hits, total, otherwise=0.0)


def _macro_f1(
    labels: Int64[np.ndarray, " cell"],
    predicted: Int64[np.ndarray, " cell"],
    weights: Float64[np.ndarray, "resample cell"],
    positive: int,
) -> Float64[np.ndarray, " resample"]:
    """Mean F1 of the classes that occur among the labels of the resample."""
    classes = np.unique(labels)
    is_label, is_predicted = labels[:, None] == classes, predicted[:, None] == classes
    hits = weights @ (is_label & is_predicted).astype(np.float64)  # (resample, class)
    present = weights @ is_label.astype(np.float64)
    f1 = _ratio(2 * hits, present + weights @ is_predicted.astype(np.float64), otherwise=0.0)
    return np.asarray(f1.sum(axis=1) / (present > 0).sum(axis=1))


def _ratio(
    numerator: Float64[np.ndarray, " *shape"], denominator: Float64[np.ndarray, " *shape"], *, otherwise: float
) -> Float64[np.ndarray, " *shape"]:
    filled = np.full_like(numerator, otherwise)
    return np.asarray(np.divide(numerator, denominator, out=filled, where=denominator > 0))


_Metric = Callable[
    [
        Int64[np.ndarray, " cell"],
        Int64[np.ndarray, " cell"],
        Float64[np.ndarray, "resample cell"],
        int,
    ],
    Float64[np.ndarray, " resample"],
]

METRICS: Final[Mapping[str, _Metric]] = MappingProxyType({"accuracy": _accuracy, "f1": _f1, "macro_f1": _macro_f1})
"""Metric functions by name; each takes labels, predictions and weights of distinct pairs."""
