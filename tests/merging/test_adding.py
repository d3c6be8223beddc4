"""The page that says how a system is added: its method runs, obeys the laws, and its test passes."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.merging.memory import merge, models
from twinmerge.merging import method as module
from twinmerge.merging.catalogue import systems
from twinmerge.merging.method import Method

PAGE = Path(__file__).parents[2] / "docs" / "adding.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def magmax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page's file, imported as a stranger's module."""
    (tmp_path / "magmax_of_the_page.py").write_text(BLOCKS[0])
    monkeypatch.syspath_prepend(tmp_path)
    import magmax_of_the_page  # type: ignore[import-not-found]

    module._registered["magmax"] = magmax_of_the_page.MagMax
    yield magmax_of_the_page
    del module._registered["magmax"]  # and no other: what the test was the first to import stays known


def test_the_tests_of_the_page_pass(magmax: Any) -> None:
    names: dict[str, Any] = {}
    exec(BLOCKS[1], names)
    names["test_the_largest_change_wins"]()


def test_the_method_of_the_page_is_listed_and_obeys_the_laws(magmax: Any) -> None:
    [listed] = [system for system in systems() if system.name == "magmax"]
    assert listed.options == {"scaling": 0.5}
    base, experts = models(3)
    method = Method.model_validate({"method": "magmax"})
    once = merge(method, base, experts)
    for other in (merge(method, base, dict(reversed(experts.items()))), merge(method, base, experts, entries=5)):
        assert all(torch.equal(other[tensor], once[tensor]) for tensor in base)
    one = merge(method.model_copy(update={"scaling": 1.0}), base, {"e0": experts["e0"]})
    assert all(torch.allclose(one[tensor].float(), experts["e0"][tensor], atol=1e-6) for tensor in base)
