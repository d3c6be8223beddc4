"""Metrics, the normalized score and its bootstrap, in plain numpy.

Every metric is computed from distinct (label, prediction) pairs with weights, never from rows. A bootstrap
resample is then one multinomial draw over the distinct tuples of (label, prediction of each predictor): the
same resample scores every predictor, and the order of the rows cannot matter.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from twinmerge.errors import DataError

MISROUTED: Final = "\x00misrouted"
"""The prediction of a row that another task's head answered: no label can equal it."""

CONFIDENCE: Final = 0.95
"""Share of the resamples that an interval holds."""

RESAMPLES: Final = 1000
"""Bootstrap resamples, unless the caller says otherwise."""

_Codes = Int64[np.ndarray, " cell"]
_Weights = Float64[np.ndarray, "resample cell"]
_Values = Float64[np.ndarray, " resample"]


class ReliabilityBin(NamedTuple):
    """Inputs whose confidence falls in one bin: their mean confidence, the share answered right, how many they are."""

    confidence: float
    accuracy: float
    rows: int


def score(metric: str, labels: Sequence[str], predicted: Sequence[str], positive_label: str | None = None) -> float:
    """A metric in `METRICS` of predictions, 0 to 1; `MISROUTED` is always wrong, `f1` is about `positive_label`.

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
    """Scores of several predictors, 0 to 1; column r scores all of them on the same resample of one task's rows.

    Args:
        metric: as for `score`, with `labels` and `positive_label`; so are the errors.
        labels: of the rows.
        predictors: for each predictor its predictions, in the order of `labels`.
        positive_label: of `f1`.
        resamples: how often as many rows as there are get drawn, with replacement.
        seed: what the draws depend on; rows in another order give the same scores.
    """
    table = _tabulate(labels, predictors)
    rows = int(table.counts.sum())
    weights = np.random.default_rng(seed).multinomial(rows, table.counts / rows, size=resamples)
    return _scores(metric, table, weights.astype(np.float64), positive_label)


def normalized_score(scores: Mapping[str, float], expert_scores: Mapping[str, float]) -> float:
    """Mean over tasks of a score as a share of the expert's own, on the same rows by the same metric (METHOD §6).

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
    """The two ends of the middle 95 % of bootstrap samples.

    NaN, of a resample in which an expert has no right answer, is left out.

    Raises:
        DataError: if no resample gives a value.
    """
    defined = samples[~np.isnan(samples)]
    if not defined.size:
        raise DataError("no bootstrap resample gives a score: an expert is hardly ever right")
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def mask_misrouted(predicted: Sequence[str], chosen: Sequence[str], expert: str) -> list[str]:
    """Predictions of a task's own head, `MISROUTED` where the router chose another expert's."""
    return [label if name == expert else MISROUTED for label, name in zip(predicted, chosen, strict=True)]


def reliability(
    confidence: Float64[np.ndarray, " row"], correct: Bool[np.ndarray, " row"], bins: int = 15
) -> list[ReliabilityBin]:
    """Mean confidence against accuracy, in bins of equal width over [0, 1]; of those that have rows, in their order.

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
    labels: _Codes
    predictors: Int64[np.ndarray, "predictor cell"]
    counts: _Codes


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
    metric: str, table: _Table, weights: _Weights, positive_label: str | None
) -> Float64[np.ndarray, "predictor resample"]:
    if metric not in METRICS:
        raise DataError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
    if metric == "f1" and positive_label is None:
        raise DataError("metric 'f1' needs the positive label")
    positive = table.classes.index(positive_label) if positive_label in table.classes else -1
    function = METRICS[metric]
    return np.stack([function(table, predicted, weights, positive) for predicted in table.predictors])


def _accuracy(table: _Table, predicted: _Codes, weights: _Weights, positive: int) -> _Values:
    """Share of the rows answered right."""
    right = weights @ (table.labels == predicted).astype(np.float64)
    return np.asarray(right / weights.sum(axis=1))


def _f1(table: _Table, predicted: _Codes, weights: _Weights, positive: int) -> _Values:
    """F1 of the positive class; 0 where it is neither there nor predicted."""
    is_label, is_predicted = table.labels == positive, predicted == positive
    hits = weights @ (is_label & is_predicted).astype(np.float64)
    total = weights @ (is_label.astype(np.float64) + is_predicted)
    return _ratio(2 * hits, total, otherwise=0.0)


def _macro_f1(table: _Table, predicted: _Codes, weights: _Weights, positive: int) -> _Values:
    """Mean F1 of the classes that occur among the labels of the resample."""
    classes = np.unique(table.labels)
    is_label, is_predicted = table.labels[:, None] == classes, predicted[:, None] == classes
    hits = weights @ (is_label & is_predicted).astype(np.float64)  # (resample, class)
    present = weights @ is_label.astype(np.float64)
    f1 = _ratio(2 * hits, present + weights @ is_predicted.astype(np.float64), otherwise=0.0)
    return np.asarray(f1.sum(axis=1) / (present > 0).sum(axis=1))


def _ratio(
    numerator: Float64[np.ndarray, " *shape"], denominator: Float64[np.ndarray, " *shape"], *, otherwise: float
) -> Float64[np.ndarray, " *shape"]:
    filled = np.full_like(numerator, otherwise)
    return np.asarray(np.divide(numerator, denominator, out=filled, where=denominator > 0))


def _chrf(table: _Table, predicted: _Codes, weights: _Weights, positive: int) -> _Values:
    """Mean over the rows of chrF (Popovic 2015), as sacrebleu computes it of one sentence."""
    sentence, texts = _sentence_chrf(), table.classes
    pairs = zip(predicted.tolist(), table.labels.tolist(), strict=True)
    values = np.array([sentence(texts[mine], [texts[right]]).score / 100 for mine, right in pairs])
    return np.asarray(weights @ values / weights.sum(axis=1))


def _sentence_chrf() -> Callable[[str, list[str]], Any]:
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        raise DataError("metric 'chrf' needs sacrebleu; pip install 'twinmerge[chrf]'") from None
    return CHRF().sentence_score


METRICS: Final[Mapping[str, Callable[[_Table, _Codes, _Weights, int], _Values]]] = MappingProxyType(
    {"accuracy": _accuracy, "f1": _f1, "macro_f1": _macro_f1, "exact_match": _accuracy, "chrf": _chrf}
)
"""Metric functions by name; each takes the distinct pairs, a predictor's classes, and weights of the pairs."""

WRITTEN: Final = frozenset({"exact_match", "chrf"})
"""Metrics of texts that a language model writes, against the row's label, which is the right one."""
