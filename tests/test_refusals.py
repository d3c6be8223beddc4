"""What is refused, through the program: one clear line, exit 2, no file, and when (the table is in refusals.py)."""

import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests import tiny
from tests.refusals import BEFORE, BOTH, BUILD, EMBEDDING, KIT, MERGE, READING, TABLE, weights
from tests.tiny import EXPERTS
from twinmerge.cli import main
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.jobs import build as build_module
from twinmerge.jobs import merge as merge_module

Families = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Families:
    @cache
    def family(name: str) -> Path:
        root = tmp_path_factory.mktemp(name)
        base, cls = tiny.BASES[name]
        tiny.make_family(root, base(), getattr(tiny.transformers, cls))
        return root

    return family


def with_recipes(made: Path, folder: Path) -> Path:
    """A copy of base and experts, with a recipe for each command; a test may spoil them."""
    copy = shutil.copytree(made, folder / "models")
    experts = {name: {"model": name, "router_data": f"{name}.jsonl"} for name in EXPERTS}
    models = [{"model": str(copy / name), "parameters": {"weight": 0.5, "density": 0.5}} for name in EXPERTS]
    recipes: dict[str, dict[str, Any]] = {
        MERGE: {"base": "base", "experts": {name: name for name in EXPERTS}, "shared": {"method": "ties"}},
        BUILD: {"base": "base", "experts": experts, "shared": {"method": "ties"}, "exclusive": {"rank": 2}},
        KIT: {"merge_method": "ties", "base_model": str(copy / "base"), "models": models},
    }
    for name, content in recipes.items():
        (copy / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return copy


@pytest.fixture
def root(made: Families, tmp_path: Path) -> Path:
    return with_recipes(made("llama"), tmp_path)


def run(root: Path, recipe: str, *options: str) -> int:
    command = BUILD if recipe == BUILD else MERGE
    return main([command, str(root / f"{recipe}.yaml"), "--out", str(root / "made" / "out"), *options])


def refused(root: Path, recipe: str, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line that a refusal prints."""
    before = contents(root)
    capsys.readouterr()
    assert run(root, recipe, *options) == 2
    printed = capsys.readouterr()
    [line] = [line for line in printed.err.splitlines() if line.startswith("twinmerge: error: ")]
    assert printed.out == ""
    assert contents(root) == before
    return line.removeprefix("twinmerge: error: ")


def contents(root: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.mark.parametrize(
    ("of", "case", "command"),
    [(of, case, command) for of, cases in TABLE.items() for case, row in cases.items() for command in row.commands],
)
def test_what_cannot_be_right_is_one_line_and_no_file(
    made: Families,
    tmp_path: Path,
    of: str,
    case: str,
    command: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row, began = TABLE[of][case], []

    def spied(module: Any) -> None:
        real = module.durable_folder
        monkeypatch.setattr(module, "durable_folder", lambda *a, **k: began.append(READING) or real(*a, **k))

    spied(build_module)
    spied(merge_module)
    root = with_recipes(made(of), tmp_path)
    row.spoil(root)
    line = refused(root, command, capsys)
    assert re.search(row.words, line), line
    assert (began or [BEFORE])[0] == row.when


@pytest.mark.parametrize("command", BOTH)
def test_a_folder_of_shards_is_refused_or_replaced_whole(
    root: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A single file beside an older index would be read by the index."""
    out = root / "made" / "out"
    tiny.llama().save_pretrained(out, max_shard_size="10KB")
    assert (out / "model.safetensors.index.json").exists()
    assert "out exists already; choose another path, or overwrite it" in refused(root, command, capsys)
    assert run(root, command, "--overwrite") == 0
    names = {path.name for path in out.glob("*.safetensors*")}
    assert names == {"model.safetensors"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def pad(root: Path) -> None:
    """Six rows more than config.json says in every embedding."""
    for name in ("base", *EXPERTS):
        weights(name, lambda t: {**t, EMBEDDING: torch.cat([t[EMBEDDING], t[EMBEDDING][:6]])})(root)


@pytest.mark.parametrize("command", [MERGE, KIT])
def test_rows_beyond_the_vocabulary_are_kept(root: Path, command: str) -> None:
    pad(root)
    assert run(root, command) == 0
    assert Checkpoint.open(root / "made" / "out").specs[EMBEDDING].shape == (tiny.VOCABULARY + 6, 16)


def test_rows_beyond_the_vocabulary_make_no_twin(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Transformers would not load it."""
    pad(root)
    words = rf"base: '{EMBEDDING}' has shape \[70, 16\], by config.json it must be \[64, 16\]"
    with pytest.raises(ValueError, match=words):
        raise ValueError(refused(root, BUILD, capsys))
