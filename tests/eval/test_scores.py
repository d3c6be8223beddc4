"""From predictions to scores: limit cases, laws of the resamples, seeds put together."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.eval.make_result import make_result, named, run, task
from twinmerge.errors import DataError
from twinmerge.eval.metrics import normalized_score
from twinmerge.eval.results import Interval, Predictions, SuiteResult
from twinmerge.eval.scores import compare, normalized_interval, score_tasks, summarize

SMALL = {"rows": 40, "tasks": ("trec", "sms"), "resamples": 40}

# --- scores and intervals ----------------------------------------------------------------------------------------


def test_both_protocols_are_scored_on_the_same_rows() -> None:
    scores = score_tasks(run(sms=task("aabb", "aabb", "aabb", "aa-b")))["sms"]
    assert (scores.routed, scores.oracle_head, scores.expert, scores.rows) == (0.75, 1.0, 1.0, 4)


@st.composite
def experts(draw: st.DrawFn) -> Predictions:
    """A contestant that answers as its experts do, each of which is right at least once."""
    tasks = {}
    for name in draw(st.sets(st.sampled_from(["trec", "sms", "movie"]), min_size=1)):
        letters = st.text("abc", min_size=1, max_size=30)
        labels = "aa" + draw(letters)
        answers = ("aa" + draw(letters) + "c" * len(labels))[: len(labels)]
        metric = draw(st.sampled_from(["accuracy", "macro_f1"]))
        tasks[name] = task(labels, answers, answers, answers, metric=metric)
    return run(**tasks)


@settings(max_examples=25)
@given(experts(), st.sampled_from(["routed", "oracle_head"]))
def test_contestant_equal_to_its_experts_scores_exactly_one(one: Predictions, protocol: str) -> None:
    assert normalized_interval([one], protocol, resamples=30) == Interval(value=1, low=1, high=1)  # type: ignore[arg-type]


@settings(max_examples=25)
@given(experts())
def test_contestant_differs_from_itself_by_exactly_nothing(one: Predictions) -> None:
    assert compare([one], [one], "routed", resamples=30).difference == Interval(value=0, low=0, high=0)


def test_value_is_the_normalized_score_of_the_plain_rows(made: tuple[SuiteResult, list[Predictions]]) -> None:
    for one in made[1]:
        scores = score_tasks(one)
        expected = normalized_score(
            {name: score.oracle_head for name, score in scores.items()},
            {name: score.expert for name, score in scores.items()},
        )
        assert normalized_interval([one], "oracle_head", resamples=5).value == expected


def test_order_of_rows_and_tasks_changes_no_bit(made: tuple[SuiteResult, list[Predictions]]) -> None:
    one = named(made[1], "twin-0.06")[0]
    order = np.random.default_rng(0).permutation(60)

    def shuffled(answers: list[str]) -> list[str]:
        return [answers[index] for index in order]

    other = one.model_copy(
        update={
            "tasks": {
                name: rows.model_copy(
                    update={key: shuffled(getattr(rows, key)) for key in ("labels", "expert", "oracle_head", "routed")}
                )
                for name, rows in reversed(one.tasks.items())
            }
        }
    )
    assert normalized_interval([one], "routed", resamples=50) == normalized_interval([other], "routed", resamples=50)


def test_interval_is_as_wide_as_the_binomial_says() -> None:
    one = run(sms=task("a" * 400, "a" * 400, "a" * 300 + "b" * 100))
    found = normalized_interval([one], "oracle_head", resamples=4000)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    # Ends of a percentile interval of 4,000 draws of a quantity in steps of 1/400: within a tenth of the half width.
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=0.1)


def test_paired_interval_is_narrower_than_the_scores_own() -> None:
    right = "a" * 300 + "b" * 100
    worse = "b" + right[1:]
    one, other = (run(sms=task("a" * 400, "a" * 400, answers)) for answers in (right, worse))
    difference = compare([one], [other], "oracle_head").difference
    own = normalized_interval([one], "oracle_head")
    assert difference.value == pytest.approx(1 / 400, abs=1e-12)
    assert difference.low >= 0
    assert difference.high - difference.low < (own.high - own.low) / 5


def test_seeds_are_averaged_within_the_resample() -> None:
    labels, first, second = "ab" * 100, "aa" * 100, "bb" * 100
    runs = [run(seed, sms=task(labels, labels, answers)) for seed, answers in enumerate((first, second))]
    # Together the two are right exactly once on every row: on the same rows their mean never moves.
    assert normalized_interval(runs, "oracle_head") == Interval(value=0.5, low=0.5, high=0.5)


def test_seeds_with_rows_of_their_own_are_drawn_by_themselves() -> None:
    first, second = "ab" * 100, "ba" * 100
    runs = [run(seed, sms=task(labels, labels, "a" * 200)) for seed, labels in enumerate((first, second))]
    together = normalized_interval(runs, "oracle_head")
    alone = normalized_interval(runs[:1], "oracle_head")
    # Two independent draws: narrower by sqrt(2), ends known to about 5 %.
    assert (together.high - together.low) * math.sqrt(2) == pytest.approx(alone.high - alone.low, rel=0.15)


def test_resample_without_a_right_expert_is_left_out() -> None:
    one = run(sms=task("abbb", "accc", "accc"))  # the expert is right on one row of four
    assert normalized_interval([one], "oracle_head") == Interval(value=1, low=1, high=1)


def test_expert_that_is_never_right_is_refused() -> None:
    with pytest.raises(DataError, match="the expert of task 'sms' scores 0: nothing can be normalized by that"):
        normalized_interval([run(sms=task("ab", "ba", "ab"))], "oracle_head", resamples=10)


def test_routed_score_needs_routed_predictions() -> None:
    with pytest.raises(DataError, match="contestant 'experts' has no routed predictions of task 'sms'"):
        normalized_interval([run(contestant="experts", sms=task("ab", "ab", "ab"))], "routed")


def test_no_predictions_are_refused() -> None:
    with pytest.raises(DataError, match="no predictions to score"):
        normalized_interval([], "routed")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (run(1, "b", sms=task("ab", "ab", "ab")), "'b' and 'twin' ran at different seeds"),
        (run(0, "b", trec=task("ab", "ab", "ab")), r"'b' at seed 0 has tasks \['trec'\], not \['sms'\]"),
        (run(0, "b", sms=task("ba", "ab", "ab")), "'b' and 'twin' were not scored on the same rows and expert of task"),
        (run(0, "b", sms=task("ab", "aa", "ab")), "not scored on the same rows and expert of task 'sms' at seed 0"),
    ],
)
def test_contestants_on_other_rows_are_not_compared(other: Predictions, message: str) -> None:
    with pytest.raises(DataError, match=message):
        compare([run(sms=task("ab", "ab", "ab"))], [other], "oracle_head")


def test_comparison_names_both_sides(made: tuple[SuiteResult, list[Predictions]]) -> None:
    runs, reference = named(made[1], "twin-0.06"), named(made[1], "ties")
    found = compare(runs, reference, "routed", resamples=20)
    assert (found.contestant, found.reference, found.protocol) == ("twin-0.06", "ties", "routed")
    scores = (normalized_interval(runs, "routed"), normalized_interval(reference, "routed"))
    assert found.difference.value == scores[0].value - scores[1].value


# --- summaries ---------------------------------------------------------------------------------------------------


def test_summary_of_one_seed_is_that_seed() -> None:
    result, _ = make_result(seeds=(3,), **SMALL)  # type: ignore[arg-type]
    for one, summary in zip(result.contestants, result.summaries, strict=True):
        assert summary.normalized_oracle_head == one.normalized_oracle_head
        assert summary.normalized_routed == one.normalized_routed
        assert (summary.bytes, summary.exclusive_ratio, summary.ms_per_input) == (
            one.bytes,
            one.exclusive_ratio,
            one.ms_per_input,
        )
        assert (summary.confusion, summary.gate_mean, summary.unseen) == (one.confusion, one.gate_mean, one.unseen)


def test_summary_is_the_mean_of_its_seeds(made: tuple[SuiteResult, list[Predictions]]) -> None:
    for summary in made[0].summaries:
        group = [one for one in made[0].contestants if one.name == summary.name]
        assert summary.seeds == [0, 1]
        assert summary.oracle_head_by_seed == [one.normalized_oracle_head.value for one in group]
        assert summary.normalized_oracle_head.value == sum(summary.oracle_head_by_seed) / 2
        # The same numbers averaged over seeds first instead of over tasks: equal up to rounding.
        by_task = [one.normalized_oracle_head for one in summary.tasks.values()]
        assert summary.normalized_oracle_head.value == pytest.approx(sum(by_task) / len(by_task), abs=1e-12)


def test_unseen_scores_are_the_mean_of_the_seeds_that_have_them(made: tuple[SuiteResult, list[Predictions]]) -> None:
    result, predictions = made
    name = next(one.name for one in result.contestants if one.unseen)
    runs = [one for one in result.contestants if one.name == name]
    without = [runs[0], *(one.model_copy(update={"unseen": {}}) for one in runs[1:])]
    assert len(runs) > 1
    assert summarize(without, predictions)[0].unseen == runs[0].unseen


def test_summary_adds_up_the_confusion_of_its_seeds(made: tuple[SuiteResult, list[Predictions]]) -> None:
    summary = next(one for one in made[0].summaries if one.name == "twin-0.06")
    first, second = (one.confusion for one in made[0].contestants if one.name == "twin-0.06")
    assert first is not None
    assert second is not None
    assert summary.confusion is not None
    assert summary.confusion["trec"]["sms"] == first["trec"]["sms"] + second["trec"]["sms"]


def test_contestant_without_a_router_has_no_routed_summary(made: tuple[SuiteResult, list[Predictions]]) -> None:
    summary = next(one for one in made[0].summaries if one.name == "experts")
    assert summary.normalized_routed is None
    assert summary.routed_by_seed == []
    assert summary.tasks["trec"].normalized_routed is None
    assert summary.gate_mean is None
    assert summary.confusion is None


def test_contestant_without_predictions_is_named(made: tuple[SuiteResult, list[Predictions]]) -> None:
    with pytest.raises(DataError, match="no predictions of contestant 'experts' at seed 0"):
        summarize(made[0].contestants, made[1][1:])
