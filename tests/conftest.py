"""What holds for every test: no network, repeatable hypothesis runs; tiny families of models and twins of them."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
from hypothesis import HealthCheck, settings

from tests.tiny import Family, families
from twinmerge.jobs.build import build

# Tensor work on shared cores has no steady pace: no deadline. Derandomised: a red run is red again.
settings.register_profile(
    "twinmerge", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("twinmerge")

Twins = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """Nothing here is to survive a power cut, and a busy disk would take half of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def made() -> Any:
    """A made-up result of a suite, and the predictions it came from."""
    from tests.eval.make_result import make_result

    return make_result(seeds=(0, 1), rows=60, tasks=("trec", "sms", "reuters"), resamples=60)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    return families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory, family: Callable[[str], Family]) -> Twins:
    """A twin's folder by family and sections of the recipe, built once for each; whole where nothing else is said."""
    built: dict[str, Path] = {}

    def get(name: str, **settings: Any) -> Path:
        settings.setdefault("exclusive", {"rank": 64, "embeddings": "exclusive"})
        key = json.dumps([name, settings], sort_keys=True)
        if key not in built:
            built[key] = tmp_path_factory.mktemp("twins") / "twin"
            build(family(name).recipe(**settings), built[key])
        return built[key]

    return get
