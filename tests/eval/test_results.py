"""Records of results: what they refuse, and that files give them back to the bit."""

import gzip
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.eval.make_result import make_result, named, run, task
from twinmerge.errors import DataError
from twinmerge.eval.results import (
    Comparison,
    Interval,
    Predictions,
    SuiteResult,
    read_predictions,
    read_result,
    write_predictions,
    write_result,
)

# --- files -------------------------------------------------------------------------------------------------------


def test_result_loads_to_the_bit(made: tuple[SuiteResult, list[Predictions]], tmp_path: Path) -> None:
    write_result(made[0], tmp_path / "results.json")
    loaded = read_result(tmp_path / "results.json")
    assert loaded == made[0]
    write_result(loaded, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "results.json").read_bytes()


@settings(max_examples=25)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_of_an_interval_load_to_the_bit(value: float) -> None:
    interval = Interval(value=value, low=-value, high=value)
    assert Interval.model_validate_json(interval.model_dump_json()) == interval


_TINY = make_result(seeds=(0,), rows=10, tasks=("trec",), resamples=2)


def test_predictions_load_to_the_bit_and_write_the_same_bytes(
    made: tuple[SuiteResult, list[Predictions]], tmp_path: Path
) -> None:
    one = named(made[1], "twin-0.06")[1]
    path = write_predictions(one, tmp_path)
    first = path.read_bytes()
    assert path.name == "twin-0.06.seed-1.predictions.json.gz"
    assert read_predictions(path) == one
    assert write_predictions(read_predictions(path), tmp_path).read_bytes() == first


def test_missing_result_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*results\.json: .*No such file"):
        read_result(tmp_path / "results.json")


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b"{}", mtime=0)[:-9], gzip.compress(b"{}" * 99, mtime=0)[:12] + b"\x07" * 9]
)
def test_damaged_predictions_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "twin.json.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .*twin\.json\.gz"):
        read_predictions(path)


def test_result_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_result(_TINY[0], path)
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(
        DataError, match=r"results\.json holds no SuiteResult of this version: format: Input should be 2"
    ):
        read_result(path)


def test_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("no json")
    with pytest.raises(DataError, match=r"results\.json holds no SuiteResult of this version: the file: Invalid JSON"):
        read_result(tmp_path / "results.json")


def test_records_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        _TINY[0].summaries[0].normalized_oracle_head.value = 2.0  # type: ignore[misc]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_result_holds_finite_numbers_only(value: float) -> None:
    with pytest.raises(ValueError, match="finite number"):
        Interval(value=value, low=0, high=0)


@pytest.mark.parametrize("name", ["", "../twin", "twin 4", "-twin"])
def test_name_that_cannot_be_a_files_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="String should match pattern"):
        run(contestant=name, sms=task("a", "a", "a"))


def rebuilt(**changes: object) -> SuiteResult:
    result, _ = _TINY
    return SuiteResult(**{**{key: getattr(result, key) for key in SuiteResult.model_fields}, **changes})  # type: ignore[arg-type]


def test_result_has_a_summary_for_every_contestant() -> None:
    with pytest.raises(ValueError, match=r"contestants are \['experts', .*, their summaries \['pretrained'"):
        rebuilt(summaries=_TINY[0].summaries[1:], comparisons=[])


def test_result_has_a_score_for_every_task() -> None:
    with pytest.raises(ValueError, match=r"contestant 'experts' has scores of \['trec'\], the suite \['sms'\]"):
        rebuilt(tasks=["sms"])


def test_result_compares_contestants_of_its_own() -> None:
    nothing = Interval(value=0, low=0, high=0)
    pair = Comparison(contestant="ties", protocol="routed", reference="adamerging", difference=nothing)
    with pytest.raises(ValueError, match="a comparison names 'ties' and 'adamerging', not both contestants"):
        rebuilt(comparisons=[pair])
