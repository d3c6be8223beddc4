"""A made-up result of a suite, for all tests of this folder."""

import pytest

from tests.eval.make_result import make_result
from twinmerge.eval.results import Predictions, SuiteResult


@pytest.fixture(scope="session")
def suite() -> tuple[SuiteResult, list[Predictions]]:
    return make_result(seeds=(0, 1), rows=60, tasks=("trec", "sms", "reuters"), resamples=60)
