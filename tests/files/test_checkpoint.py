"""Checkpoints: what is written is read back to the bit, and damage is named."""

import json
from pathlib import Path

import pytest
import torch

from tests.tiny import write_checkpoint
from twinmerge.errors import CheckpointError
from twinmerge.files.checkpoint import Checkpoint, TensorSpec
from twinmerge.files.hashes import sha256_of
from twinmerge.files.writer import save_tensors

# ---- opening


def test_config_is_read_from_the_folder_and_empty_for_a_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", {"a": torch.zeros(3)})
    assert Checkpoint.open(folder).config == {}
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert Checkpoint.open(folder).config == {"model_type": "bert"}
    assert Checkpoint.open(folder / "model.safetensors").config == {}


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", {"a": torch.zeros(3, 4, dtype=torch.bfloat16)})
    spec = Checkpoint.open(folder).specs["a"]
    assert spec == TensorSpec("a", (3, 4), torch.bfloat16, folder / "model.safetensors", 24)


def test_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist; expected a checkpoint folder"):
        Checkpoint.open(tmp_path / "nowhere")


def test_folder_of_pickles_says_to_convert(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin; convert it first"):
        Checkpoint.open(tmp_path)


def test_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it holds nothing"):
        Checkpoint.open(tmp_path)
    (tmp_path / "readme.md").touch()
    with pytest.raises(CheckpointError, match=r"it holds readme\.md"):
        Checkpoint.open(tmp_path)


def test_single_file_beside_an_index_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", {"a": torch.zeros(3), "b": torch.zeros(3)}, max_shard_bytes=1)
    save_tensors({"a": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="one of them is stale, remove it"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("text", "words"), [("{", "is not valid JSON"), ("[1]", "must hold a JSON object, found list")]
)
def test_invalid_config_is_named(tmp_path: Path, text: str, words: str) -> None:
    folder = write_checkpoint(tmp_path / "model", {"a": torch.zeros(3)})
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"config.json {words}"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("keep", [0, 4, 20, 60])
def test_file_cut_inside_its_header_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors({"a": torch.zeros(3)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"x\.safetensors is truncated or no safetensors file: its {keep} bytes"):
        Checkpoint.open(path)


def test_file_cut_inside_its_data_is_named_with_its_tensor(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors({"a": torch.zeros(3), "b": torch.zeros(3)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"x\.safetensors is truncated: tensor 'b' ends at byte 24 of the data"):
        Checkpoint.open(path)


def file_with_header(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        b"\xff\xfe\x00\x01",
        b"12",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 12]}}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": ["3"], "data_offsets": [0, 12]}}',
        b'{"a": {"dtype": "F32", "shape": [-3], "data_offsets": [12, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [-12, 0]}}',
        b'{"a": {"dtype": ["F32"], "shape": [3], "data_offsets": [0, 12]}}',
        b'{"a": {"shape": [3]}}',
    ],
)
def test_garbled_header_is_named(tmp_path: Path, header: bytes) -> None:
    path = file_with_header(tmp_path / "x.safetensors", header, bytes(12))
    with pytest.raises(CheckpointError, match=r"x\.safetensors is no safetensors file: its header cannot be"):
        Checkpoint.open(path)


def test_tensor_with_too_few_bytes_for_its_shape_is_named(tmp_path: Path) -> None:
    header = b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}'
    with pytest.raises(CheckpointError, match=r"'a' has 12 bytes, shape \(4,\) needs 16"):
        Checkpoint.open(file_with_header(tmp_path / "x.safetensors", header, bytes(12)))


def test_unknown_dtype_lists_the_known(tmp_path: Path) -> None:
    header = b'{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'
    with pytest.raises(CheckpointError, match="dtype 'F4' is not supported; known are F64, F32"):
        Checkpoint.open(file_with_header(tmp_path / "x.safetensors", header, bytes(1)))


def test_git_lfs_pointer_says_to_pull(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="is a Git LFS pointer, not the weights; run `git lfs pull`"):
        Checkpoint.open(tmp_path)


# ---- an index and its shards


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", {"a": torch.zeros(3), "b": torch.ones(3)}, max_shard_bytes=1)


def edit_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_index_without_a_map_is_refused(sharded: Path) -> None:
    edit_index(sharded, ["a"])
    with pytest.raises(CheckpointError, match="must hold a 'weight_map' of tensor names to file names"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("file", ["model-00009-of-00009.safetensors", "../model/model-00001-of-00002.safetensors"])
def test_index_naming_a_file_outside_or_absent_is_refused(sharded: Path, file: str) -> None:
    edit_index(sharded, {"a": SHARD_1, "b": SHARD_2, "c": file})
    with pytest.raises(CheckpointError, match="which is not in the folder; is the copy complete"):
        Checkpoint.open(sharded)


def test_index_naming_a_tensor_its_shards_lack_is_refused(sharded: Path) -> None:
    edit_index(sharded, {"a": SHARD_1, "b": SHARD_2, "c": SHARD_2})
    with pytest.raises(CheckpointError, match=f"names 1 tensors that its shards do not hold, first 'c' in {SHARD_2}"):
        Checkpoint.open(sharded)


def test_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_tensors({"a": torch.zeros(3), "b": torch.zeros(3)}, sharded / SHARD_2)
    with pytest.raises(CheckpointError, match=f"tensor 'a' is in two shards, {SHARD_1} and {SHARD_2}"):
        Checkpoint.open(sharded)


def test_tensor_that_the_index_does_not_place_is_refused(sharded: Path) -> None:
    save_tensors({"b": torch.zeros(3), "c": torch.zeros(3)}, sharded / SHARD_2)
    with pytest.raises(CheckpointError, match=f"{SHARD_2} holds tensor 'c', which .* does not place there"):
        Checkpoint.open(sharded)


# ---- reading


def test_unknown_tensor_is_named(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match="model has no tensor 'c' among its 2"):
        Checkpoint.open(sharded).read("c")


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 4)])
def test_rows_outside_the_tensor_are_refused(sharded: Path, start: int, stop: int) -> None:
    with pytest.raises(CheckpointError, match=rf"tensor 'a' of shape \(3,\) has no rows {start}:{stop}"):
        Checkpoint.open(sharded).read_rows("a", start, stop)


def test_a_scalar_has_no_rows(tmp_path: Path) -> None:
    save_tensors({"a": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"shape \(\) has no rows"):
        Checkpoint.open(tmp_path / "x.safetensors").read_rows("a", 0, 0)


def test_file_that_disappears_after_opening_is_named(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    (sharded / SHARD_1).unlink()
    with pytest.raises(CheckpointError, match=f"{SHARD_1}: tensor 'a' cannot be read"):
        checkpoint.read("a")


def test_file_that_is_cut_after_opening_is_named(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    (sharded / SHARD_1).write_bytes((sharded / SHARD_1).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{SHARD_1}: tensor 'a' cannot be read"):
        checkpoint.read("a")


# ---- hashes


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_entries_are_the_slice_of_the_flattened_tensor(tmp_path: Path) -> None:
    save_tensors({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(6)}, tmp_path / "x.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "x.safetensors")
    assert checkpoint.read_flat("a", 2, 5).tolist() == [2, 3, 4]
    assert checkpoint.read_flat("a", 2, 2).numel() == 0
    for start, stop in ((-1, 2), (5, 4), (0, 7), (6, 12), (7, 7)):
        with pytest.raises(CheckpointError, match=rf"'a' of 6 entries has none at {start}:{stop}"):
            checkpoint.read_flat("a", start, stop)


def test_overlapping_tensors_are_damage(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="the data of tensor 'b' overlaps another's"):
        Checkpoint.open(tmp_path / "x.safetensors")


@pytest.mark.parametrize("names", [("diffusion_pytorch_model",), ("a", "b")])
def test_weights_of_another_name_are_found_if_there_is_one_set(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        save_tensors({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    if len(names) == 1:
        assert Checkpoint.open(tmp_path).stem == "diffusion_pytorch_model"
    else:
        with pytest.raises(CheckpointError, match=r"holds several sets of weights \(a, b\); name one file"):
            Checkpoint.open(tmp_path)
