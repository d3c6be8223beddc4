"""What a manifest says of its inputs: hashes that are those of the files, licences as the cards name them."""

import hashlib
from pathlib import Path

import pytest
import torch

from tests.tiny import write_checkpoint
from twinmerge.errors import MismatchError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.hashes import header_sha256
from twinmerge.files.writer import save_tensors
from twinmerge.models.provenance import describe_input, licence_of, portable, require_unchanged


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tensors({"a": torch.arange(6.0).reshape(2, 3)}, tmp_path / "model.safetensors")
    return tmp_path


def test_files_are_described_by_size_and_hash(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    assert describe_input(Checkpoint.open(folder), "someone/x").content() == {
        "source": "someone/x",
        "bytes": 24,
        "licence": None,
        "files": {"model.safetensors": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}},
    }


def test_every_shard_is_described(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {name: torch.zeros(4) for name in "abc"}, 16)
    assert len(describe_input(Checkpoint.open(tmp_path), "x").files) == 3


def test_header_hash_tells_shapes_and_not_values(folder: Path) -> None:
    described = describe_input(Checkpoint.open(folder), "x", whole=False).files["model.safetensors"]
    first = described.header_sha256
    assert set(described.content()) == {"bytes", "header_sha256"}
    save_tensors({"a": torch.ones(2, 3)}, folder / "model.safetensors")
    assert header_sha256(folder / "model.safetensors") == first
    save_tensors({"a": torch.ones(3, 2)}, folder / "model.safetensors")
    assert header_sha256(folder / "model.safetensors") != first


def test_input_that_changed_is_refused(folder: Path) -> None:
    entry = describe_input(Checkpoint.open(folder), "x")
    require_unchanged(entry, Checkpoint.open(folder), "base")
    save_tensors({"a": torch.ones(2, 3)}, folder / "model.safetensors")
    with pytest.raises(MismatchError, match=r"^base .* is not what the twin was built from: model\.safetensors"):
        require_unchanged(entry, Checkpoint.open(folder), "base")


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\n", "apache-2.0"),
        ("---\nlicense: [mit, cc-by-4.0]\n---\n", "mit, cc-by-4.0"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\ntags: [x]\n---\n", None),
        ("---\n- a list\n---\n", None),
        ("# no front matter\nlicense: mit\n", None),
        ("---\nlicense: mit\nit never ends\n", None),
        ("", None),
        ("---\nlicense: [mit\n---\n", "unreadable: README.md: while parsing a flow sequence"),
    ],
)
def test_licence_is_what_the_card_names(tmp_path: Path, card: str, licence: str | None) -> None:
    (tmp_path / "README.md").write_text(card)
    assert licence_of(tmp_path) == licence


def test_adapters_card_lies_beside_its_file(tmp_path: Path) -> None:
    save_tensors({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    described = describe_input(Checkpoint.open(tmp_path / "adapter_model.safetensors"), "x")
    assert described.licence == "mit"


def test_a_source_is_called_as_another_machine_may_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, model = tmp_path / "recipes", tmp_path / "models" / "x"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert portable(root, "someone/x") == "someone/x"
    assert portable(root, "../models/x") == "../models/x"
    assert portable(root, str(model)) == portable(root, "~/models/x") == "../models/x"
    assert portable(root, model) == portable(root, "models/x", model) == "../models/x"
    assert portable(root, "models/x", tmp_path / "hub" / "snapshot") == "models/x"
    assert portable(Path("/usr/recipes"), model) == "x"
    assert portable(Path("/"), model) == "x"
