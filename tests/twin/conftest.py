"""Tiny families of models, written once for all tests of this folder."""

from collections.abc import Callable

import pytest

from tests.tiny import Family, families


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    return families(tmp_path_factory.mktemp("families"))
