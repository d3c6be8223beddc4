import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from twinmerge.errors import DataError
from twinmerge.eval.metrics import (
    METRICS,
    MISROUTED,
    bootstrap,
    mask_misrouted,
    normalized_score,
    percentile_interval,
    reliability,
    score,
)

# Sums of small integers are exact; what may differ from scikit-learn is the order of one division and one mean.
TOLERANCE = 1e-12

Answers = list[tuple[str, str, str]]  # label, one prediction, another one


def answers() -> st.SearchStrategy[Answers]:
    classes = st.sampled_from(["a", "b", "c", "d"])
    return st.lists(st.tuples(classes, classes | st.just(MISROUTED), classes), min_size=1, max_size=60)


def columns(rows: Answers) -> tuple[list[str], list[str], list[str]]:
    labels, first, second = zip(*rows, strict=True)
    return list(labels), list(first), list(second)


@settings(max_examples=30)
@given(answers())
def test_metrics_equal_scikit_learns(rows: Answers) -> None:
    labels, predicted, _ = columns(rows)
    expected = {
        "accuracy": accuracy_score(labels, predicted),
        "f1": f1_score(labels, predicted, labels=["a"], average="macro", zero_division=0),
        "macro_f1": f1_score(labels, predicted, labels=sorted(set(labels)), average="macro", zero_division=0),
    }
    found = {name: score(name, labels, predicted, "a" if name == "f1" else None) for name in expected}
    assert found == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("metric", METRICS)
def test_right_answers_score_one_and_misrouted_rows_zero(metric: str) -> None:
    labels = ["a", "b", "a", "c"]
    assert score(metric, labels, labels, "a") == 1.0
    assert score(metric, labels, [MISROUTED] * 4, "a") == 0.0


def test_misrouted_rows_add_no_class_to_macro_f1() -> None:
    assert score("macro_f1", ["a", "a", "b"], ["a", MISROUTED, "b"]) == pytest.approx((2 / 3 + 1) / 2, abs=TOLERANCE)


def test_f1_of_a_class_that_is_neither_there_nor_predicted_is_zero() -> None:
    assert score("f1", ["a", "b"], ["a", "b"], "never") == 0.0


@settings(max_examples=30)
@given(answers(), st.randoms(use_true_random=False), st.sampled_from(sorted(METRICS)))
def test_order_of_rows_changes_no_bit(rows: Answers, random: object, metric: str) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = (
        bootstrap(metric, labels, [a, b], positive_label="a", resamples=20)
        for labels, a, b in (columns(rows), columns(shuffled))
    )
    assert np.array_equal(one, other)


@settings(max_examples=30)
@given(answers(), st.sampled_from(sorted(METRICS)))
def test_equal_predictors_score_the_same_on_every_resample(rows: Answers, metric: str) -> None:
    labels, predicted, other = columns(rows)
    scores = bootstrap(metric, labels, [predicted, other, predicted], positive_label="a", resamples=50)
    assert np.array_equal(scores[0], scores[2])
    assert scores.shape == (3, 50)
    assert ((scores >= 0) & (scores <= 1)).all()


def test_bootstrap_depends_on_its_seed_alone() -> None:
    labels, predicted = ["a", "b"] * 20, ["a"] * 40
    one, same, other = (bootstrap("accuracy", labels, [predicted], seed=seed) for seed in ((1, 2), (1, 2), (1, 3)))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_bootstrap_spreads_as_the_binomial_says() -> None:
    labels, predicted = ["a"] * 400, ["a"] * 300 + ["b"] * 100
    scores = bootstrap("accuracy", labels, [predicted], resamples=4000)[0]
    expected = (0.75 * 0.25 / 400) ** 0.5
    # 4,000 draws: standard errors of the mean and of the deviation are 1.6 % and 1.1 % of the deviation; five of each.
    assert scores.mean() == pytest.approx(0.75, abs=0.08 * expected)
    assert scores.std() == pytest.approx(expected, rel=0.06)


def test_bootstrap_equals_metrics_of_the_drawn_rows() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = (list(map(str, rng.integers(4, size=50))) for _ in range(2))
    cells, counts = np.unique(np.array([labels, predicted]), axis=1, return_counts=True)
    drawn = np.random.default_rng((0,)).multinomial(50, counts / 50, size=20)
    found = bootstrap("macro_f1", labels, [predicted], resamples=20, seed=(0,))[0]
    expected = [score("macro_f1", *(list(np.repeat(row, weights)) for row in cells)) for weights in drawn]
    assert found == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("metric", "labels", "predicted", "message"),
    [
        ("auc", ["a"], ["a"], "unknown metric 'auc'; known: accuracy, f1, macro_f1"),
        ("f1", ["a"], ["a"], "metric 'f1' needs the positive label"),
        ("accuracy", [], [], "need as many, and at least one"),
        ("accuracy", ["a", "b"], ["a"], r"\[1\] predictions for 2 labels: need as many, and at least one"),
    ],
)
def test_what_cannot_be_scored_is_refused(metric: str, labels: list[str], predicted: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        score(metric, labels, predicted)


def test_normalized_score_is_the_mean_share_of_the_experts() -> None:
    assert normalized_score({"a": 0.4, "b": 0.9}, {"b": 0.9, "a": 0.8}) == 0.75


@settings(max_examples=30)
@given(st.dictionaries(st.sampled_from("abcdefgh"), st.floats(1e-3, 1), min_size=1))
def test_experts_score_exactly_one(scores: dict[str, float]) -> None:
    assert normalized_score(scores, scores) == 1.0


def test_expert_that_is_never_right_normalizes_nothing() -> None:
    with pytest.raises(DataError, match="the expert of task 'sms' scores 0: nothing can be normalized by that"):
        normalized_score({"sms": 0.5}, {"sms": 0.0})


@pytest.mark.parametrize("experts", [{}, {"b": 1.0}])
def test_every_score_needs_its_expert(experts: dict[str, float]) -> None:
    with pytest.raises(DataError, match=r"tasks are \['a'\], experts' \[.*\]"):
        normalized_score({"a": 1.0}, experts)


def test_interval_holds_the_middle_95_percent() -> None:
    assert percentile_interval(np.arange(1001) / 1000) == pytest.approx((0.025, 0.975), abs=TOLERANCE)


def test_interval_leaves_out_resamples_without_a_value() -> None:
    assert percentile_interval(np.array([np.nan, 0.5, np.nan, 0.5])) == (0.5, 0.5)
    with pytest.raises(DataError, match="no bootstrap resample gives a score"):
        percentile_interval(np.array([np.nan]))


def test_rows_of_another_head_are_misrouted() -> None:
    assert mask_misrouted(["a", "b"], ["sms", "trec"], "sms") == ["a", MISROUTED]


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1), st.integers(1, 20))
def test_bins_of_confidence_hold_every_row(rows: list[tuple[float, bool]], bins: int) -> None:
    confidence, correct = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    assert sum(one.rows for one in reliability(confidence, correct, bins)) == len(rows)


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([], [], "no confidences: calibration needs at least one row"),
        ([0.5, 1.5], [True, False], r"a confidence must lie in \[0, 1\]; found 0\.5 to 1\.5"),
        ([float("nan")], [True], r"a confidence must lie in \[0, 1\]"),
    ],
)
def test_confidences_that_are_none_are_refused(confidence: list[float], correct: list[bool], message: str) -> None:
    with pytest.raises(DataError, match=message):
        reliability(np.array(confidence, dtype=np.float64), np.array(correct, dtype=bool))
