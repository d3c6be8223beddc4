"""Makes scores of predictions: normalized, with bootstrap intervals, compared, and summed up over seeds."""

import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import numpy as np
from jaxtyping import Float64

from twinmerge.errors import DataError
from twinmerge.eval.metrics import RESAMPLES, bootstrap, normalized_score, percentile_interval, score
from twinmerge.eval.results import (
    Comparison,
    ContestantResult,
    Interval,
    Predictions,
    Protocol,
    Summary,
    TaskPredictions,
    TaskScore,
    TaskSummary,
)


def score_tasks(predictions: Predictions) -> dict[str, TaskScore]:
    """Raw scores of one contestant on every task, both protocols and the expert's."""
    return {name: _score_task(task) for name, task in predictions.tasks.items()}


def normalized_interval(runs: Sequence[Predictions], protocol: Protocol, resamples: int = RESAMPLES) -> Interval:
    """Normalized score of one contestant, mean over its seeds, with its 95 % interval; 1.0 = as good as the experts.

    A resample draws each task's rows once and scores contestant and expert of every seed on them; where seeds
    have test rows of their own (other labels), each such set is drawn by itself. The seeds' scores are averaged
    within the resample, so the interval is about the rows; how much seeds differ is told by their own values.

    Args:
        runs: the contestant's predictions, one for each seed.
        protocol: who picks the head.
        resamples: number of resamples.

    Raises:
        DataError: if tasks differ between runs, an expert scores 0, or `routed` is asked of a contestant
            without a router.
    """
    _check_same_rows([runs], protocol)
    value = _value(runs, protocol)
    low, high = percentile_interval(_resampled([runs], protocol, resamples)[0])
    return Interval(value=value, low=low, high=high)


def compare(
    runs: Sequence[Predictions], reference: Sequence[Predictions], protocol: Protocol, resamples: int = RESAMPLES
) -> Comparison:
    """Normalized score of one contestant minus another's, at the same seeds in the same order, on the same resamples.

    0.01 is one point; the first is better by more than the interval if `low > 0`.

    Raises:
        DataError: as `normalized_interval`, or if the two were not scored on the same rows and experts.
    """
    _check_same_rows([runs, reference], protocol)
    first, second = _resampled([runs, reference], protocol, resamples)
    low, high = percentile_interval(first - second)
    return Comparison(
        contestant=runs[0].contestant,
        reference=reference[0].contestant,
        protocol=protocol,
        difference=Interval(value=_value(runs, protocol) - _value(reference, protocol), low=low, high=high),
    )


def summarize(
    contestants: Sequence[ContestantResult], predictions: Sequence[Predictions], resamples: int = RESAMPLES
) -> list[Summary]:
    """Every contestant over its seeds, in the order of first appearance; predictions are matched by name and seed.

    Raises:
        DataError: if a contestant's predictions are missing, or as `normalized_interval`.
    """
    runs_of = {(one.contestant, one.seed): one for one in predictions}
    groups: dict[str, list[ContestantResult]] = defaultdict(list)
    for one in contestants:
        if (one.name, one.seed) not in runs_of:
            raise DataError(f"no predictions of contestant {one.name!r} at seed {one.seed}")
        groups[one.name].append(one)
    return [
        _summarize_one(group, [runs_of[one.name, one.seed] for one in group], resamples) for group in groups.values()
    ]


def _score_task(task: TaskPredictions) -> TaskScore:
    def scored(predicted: list[str]) -> float:
        return score(task.metric, task.labels, predicted, task.positive_label)

    return TaskScore(
        metric=task.metric,
        routed=None if task.routed is None else scored(task.routed),
        oracle_head=scored(task.oracle_head),
        expert=scored(task.expert),
        rows=len(task.labels),
    )


def _value(runs: Sequence[Predictions], protocol: Protocol) -> float:
    """Normalized score, mean over seeds."""
    tables = [score_tasks(run) for run in runs]
    return fmean(
        normalized_score(
            {name: getattr(one, protocol) for name, one in scores.items()},
            {name: one.expert for name, one in scores.items()},
        )
        for scores in tables
    )


def _resampled(
    contestants: Sequence[Sequence[Predictions]], protocol: Protocol, resamples: int
) -> Float64[np.ndarray, "contestant resample"]:
    """Normalized scores of contestants, averaged over tasks and seeds within each resample."""
    runs_at = list(zip(*contestants, strict=True))  # for each seed, the run of each contestant
    total = np.zeros((len(contestants), resamples))
    for task in sorted(runs_at[0][0].tasks):
        for index, group in enumerate(_group_by_rows(runs_at, task)):
            first = group[0][0].tasks[task]
            predictors = [
                answers
                for runs in group
                for answers in (runs[0].tasks[task].expert, *(getattr(run.tasks[task], protocol) for run in runs))
            ]
            scores = bootstrap(
                first.metric,
                first.labels,
                predictors,
                positive_label=first.positive_label,
                resamples=resamples,
                seed=(0, zlib.crc32(task.encode()), index),
            ).reshape(len(group), 1 + len(contestants), resamples)
            expert = np.where(scores[:, :1] > 0, scores[:, :1], np.nan)
            total += (scores[:, 1:] / expert).sum(axis=0)
    return np.asarray(total / (len(runs_at) * len(runs_at[0][0].tasks)))


def _check_same_rows(contestants: Sequence[Sequence[Predictions]], protocol: Protocol) -> None:
    first = contestants[0]
    tasks = set(first[0].tasks) if first else set()
    if not tasks:
        raise DataError("no predictions to score")
    for runs in contestants:
        if [run.seed for run in runs] != [run.seed for run in first]:
            raise DataError(f"{runs[0].contestant!r} and {first[0].contestant!r} ran at different seeds")
        for run, other in zip(runs, first, strict=True):
            if set(run.tasks) != tasks:
                raise DataError(
                    f"{run.contestant!r} at seed {run.seed} has tasks {sorted(run.tasks)}, not {sorted(tasks)}"
                )
            for name, task in run.tasks.items():
                if getattr(task, protocol) is None:
                    raise DataError(f"contestant {run.contestant!r} has no routed predictions of task {name!r}")
                if (task.labels, task.expert) != (other.tasks[name].labels, other.tasks[name].expert):
                    raise DataError(
                        f"{run.contestant!r} and {other.contestant!r} were not scored on the same rows and expert "
                        f"of task {name!r} at seed {run.seed}"
                    )


def _group_by_rows(runs_at: Sequence[tuple[Predictions, ...]], task: str) -> Iterable[list[tuple[Predictions, ...]]]:
    """Seeds whose test rows are the same, so far as their labels tell, are resampled together."""
    groups: dict[tuple[str, ...], list[tuple[Predictions, ...]]] = defaultdict(list)
    for runs in runs_at:
        groups[tuple(runs[0].tasks[task].labels)].append(runs)
    return groups.values()


def _summarize_one(group: Sequence[ContestantResult], runs: Sequence[Predictions], resamples: int) -> Summary:
    first = group[0]
    routed = [one.normalized_routed.value for one in group if one.normalized_routed is not None]
    times = [one.ms_per_input for one in group if one.ms_per_input is not None]
    gates = [one.gate_mean for one in group if one.gate_mean is not None]
    return Summary(
        name=first.name,
        title=first.title,
        kind=first.kind,
        seeds=[one.seed for one in group],
        normalized_routed=normalized_interval(runs, "routed", resamples) if routed else None,
        normalized_oracle_head=normalized_interval(runs, "oracle_head", resamples),
        routed_by_seed=routed,
        oracle_head_by_seed=[one.normalized_oracle_head.value for one in group],
        exclusive_ratio=fmean(one.exclusive_ratio for one in group),
        bytes={part: round(mean) for part, mean in _mean_by_key([one.bytes for one in group]).items()},
        ms_per_input=fmean(times) if times else None,
        tasks={name: _summarize_task([one.tasks[name] for one in group]) for name in first.tasks},
        gate_mean={task: _mean_by_key([gate[task] for gate in gates]) for task in gates[0]} if gates else None,
        confusion=_sum_confusion([one.confusion for one in group if one.confusion is not None]),
        unseen=_mean_by_key([one.unseen for one in group if one.unseen] or [{}]),
    )


def _summarize_task(scores: Sequence[TaskScore]) -> TaskSummary:
    routed = [one.routed for one in scores if one.routed is not None]
    ratios = [one.routed / one.expert for one in scores if one.routed is not None]
    return TaskSummary(
        metric=scores[0].metric,
        rows=round(fmean(one.rows for one in scores)),
        expert=fmean(one.expert for one in scores),
        routed=fmean(routed) if routed else None,
        oracle_head=fmean(one.oracle_head for one in scores),
        normalized_routed=fmean(ratios) if ratios else None,
        normalized_oracle_head=fmean(one.oracle_head / one.expert for one in scores),
    )


def _mean_by_key(tables: Sequence[Mapping[str, float]] | Sequence[Mapping[str, int]]) -> dict[str, float]:
    return {key: fmean(table[key] for table in tables) for key in tables[0]}


def _sum_confusion(tables: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]] | None:
    if not tables:
        return None
    total: dict[str, Counter[str]] = defaultdict(Counter)
    for table in tables:
        for task, row in table.items():
            total[task].update(row)
    return {task: dict(row) for task, row in total.items()}
