"""Tiny families of models, and twins built from them, written once for all tests of this folder."""

import os
from collections.abc import Callable, Iterator

import pytest

from tests.tiny import Family, families


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """Nothing here is to survive a power cut, and a busy disk would take half of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    return families(tmp_path_factory.mktemp("families"))
