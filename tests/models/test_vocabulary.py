"""Which tokens are whose, by tokenizers and the rows of tables alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from twinmerge.errors import MismatchError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.models.source import Expert
from twinmerge.models.vocabulary import Added, Vocabulary, vocabulary_of, widened

TABLES = ("embed", "out")


def checkpoint(folder: Path, rows: Mapping[str, int], config: dict[str, Any] | None = None) -> Checkpoint:
    torch.manual_seed(len(folder.name))
    tensors: dict[str, Tensor] = {name: torch.randn(count, 3) for name, count in rows.items()}
    opened = Checkpoint.open(tiny.write_checkpoint(folder, {"a.first": torch.ones(2), **tensors}))
    return Checkpoint(opened.path, opened.specs, config or {})


def expert(folder: Path, rows: Mapping[str, int]) -> Expert:
    return Expert(folder.name, checkpoint(folder, rows), {name: name for name in (*rows, "a.first")}, ())


def test_models_without_tables_have_no_tokens(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", {})
    assert vocabulary_of(base, (), {"a": expert(tmp_path / "a", {})}, {}, {}) is None


def test_experts_of_the_bases_tokens_have_none_of_their_own(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", {"embed": 4})
    known = {"x": 0}
    assert vocabulary_of(base, TABLES, {"a": expert(tmp_path / "a", {"embed": 4})}, known, {"a": known}) is None


def test_tables_of_different_sizes_are_refused(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", {"embed": 4, "out": 4})
    with pytest.raises(MismatchError, match="expert 'a': every table over the vocabulary must have 6 rows, found 4 in"):
        vocabulary_of(base, TABLES, {"a": expert(tmp_path / "a", {"embed": 6, "out": 4})}, {}, {})


def test_config_names_the_rows_wherever_it_names_tokens(tmp_path: Path) -> None:
    vocabulary = Vocabulary(base=4, size=7, added={"a": Added(ids=[4], start=6, rows=5)})
    for config in ({"vocab_size": 4}, {"text_config": {"vocab_size": 4, "x": 1}}, {}):
        base = checkpoint(tmp_path / f"base{len(config)}", {"embed": 4}, config)
        experts = {"a": expert(tmp_path / f"a{len(config)}", {"embed": 5})}
        wide, found = widened(base, TABLES, experts, vocabulary)
        text = wide.config.get("text_config", wide.config)
        assert text.get("vocab_size") == (7 if config else None)
        assert text.get("x") == config.get("text_config", {}).get("x")
        own = experts["a"].checkpoint.read("embed")
        assert wide.read("embed")[6].equal(own[4])
        assert wide.read("embed")[4:6].eq(0).all()
        assert found["a"].checkpoint.read("embed")[:4].equal(own[:4])
        assert next(iter(found["a"].checkpoint.specs.values())).file.parent == found["a"].checkpoint.path


def test_rows_of_an_expert_and_back() -> None:
    vocabulary = Vocabulary(base=4, size=8, added={"a": Added(ids=[3, 4], start=6, rows=5)})
    assert vocabulary.own_rows("a").tolist() == [0, 1, 2, 6, 7]
    assert vocabulary.own_rows("b").tolist() == [0, 1, 2, 3]
    assert vocabulary.own_ids(torch.tensor([[2, 6, 7, 3]]), "a").tolist() == [[2, 3, 4, 0]]
