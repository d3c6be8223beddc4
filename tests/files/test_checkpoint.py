"""Checkpoints: what is written is read back to the bit, and damage is named."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from twinmerge.errors import CheckpointError, OutputExistsError
from twinmerge.files import checkpoint as module
from twinmerge.files.checkpoint import (
    Checkpoint,
    TensorSpec,
    save_checkpoint,
    save_tensors,
    sha256_of,
)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def one_of_each_dtype() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {str(dtype): (torch.randn(3, 5, generator=generator) * 9).to(dtype) for dtype in DTYPES}
    return {**tensors, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 7), "odd bool": torch.ones(3) > 0}


def same_bits(a: Tensor, b: Tensor) -> bool:
    def raw(x: Tensor) -> Tensor:
        return x.contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def specs_of(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(t.shape), t.dtype, Path("unused"), t.nbytes) for name, t in tensors.items()]


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def write_folder(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int = 10**9) -> Path:
    folder.mkdir()
    save_checkpoint(specs_of(tensors), tensors.__getitem__, folder, max_shard_bytes)
    return folder


# ---- save and load to the bit


def test_every_dtype_is_read_back_to_the_bit(tmp_path: Path) -> None:
    tensors = one_of_each_dtype()
    save_tensors(tensors, tmp_path / "x.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "x.safetensors")
    assert checkpoint.specs.keys() == tensors.keys()
    assert all(same_bits(checkpoint.read(name), tensors[name]) for name in tensors)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())


def test_safetensors_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path) -> None:
    tensors = one_of_each_dtype()
    save_tensors(tensors, tmp_path / "ours.safetensors")
    loaded = load_file(tmp_path / "ours.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(same_bits(loaded[name], tensors[name]) for name in tensors)
    save_file(tensors, tmp_path / "theirs.safetensors")
    theirs = Checkpoint.open(tmp_path / "theirs.safetensors")
    assert all(same_bits(theirs.read(name), tensors[name]) for name in tensors)


@given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=8), st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=5
    ),
    max_shard_bytes=st.integers(1, 200),
)
def test_sharding_changes_no_bit_whatever_the_limit(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[int, ...]], max_shard_bytes: int
) -> None:
    shapes.pop("__metadata__", None)
    tensors = {name: torch.randn(shape).to(DTYPES[i % 4]) for i, (name, shape) in enumerate(shapes.items())}
    folder = write_folder(tmp_path_factory.mktemp("shards") / "model", tensors, max_shard_bytes)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.specs.keys() == tensors.keys()
    assert all(same_bits(checkpoint.read(name), tensors[name]) for name in tensors)


def test_rows_are_the_slice_of_the_tensor(tmp_path: Path) -> None:
    tensors = one_of_each_dtype()
    save_tensors(tensors, tmp_path / "x.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "x.safetensors")
    for dtype in map(str, DTYPES):
        assert same_bits(checkpoint.read_rows(dtype, 1, 3), tensors[dtype][1:3])
    assert checkpoint.read_rows("torch.int8", 2, 2).shape == (0, 5)


def test_transposed_and_shared_tensors_are_written_by_value(tmp_path: Path) -> None:
    square = torch.arange(6.0).view(2, 3)
    save_tensors({"a": square.T, "b": square, "c": square}, tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    assert torch.equal(loaded["a"], square.T)
    assert torch.equal(loaded["b"], loaded["c"])


def test_metadata_stands_in_the_header_beside_the_format(tmp_path: Path) -> None:
    save_tensors({"a": torch.zeros(1)}, tmp_path / "x.safetensors", {"made by": "test"})
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "made by": "test"}


def test_data_of_every_tensor_is_aligned_to_its_item_size(tmp_path: Path) -> None:
    save_tensors(one_of_each_dtype(), tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    for name, tensor in one_of_each_dtype().items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0


# ---- sharded folders


def test_shards_keep_the_limit_and_the_index_is_transformers_layout(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(10) for i in range(5)}  # 40 bytes each
    folder = write_folder(tmp_path / "model", tensors, max_shard_bytes=80)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 200}
    assert index["weight_map"] == {
        "t0": "model-00001-of-00003.safetensors",
        "t1": "model-00001-of-00003.safetensors",
        "t2": "model-00002-of-00003.safetensors",
        "t3": "model-00002-of-00003.safetensors",
        "t4": "model-00003-of-00003.safetensors",
    }
    assert len(list(folder.iterdir())) == 4


def test_one_shard_is_called_model_safetensors_and_has_no_index(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", {"a": torch.zeros(3)})
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]


def test_each_tensor_is_asked_for_once_in_the_order_given(tmp_path: Path) -> None:
    asked: list[str] = []
    tensors = {"z": torch.zeros(2), "a": torch.zeros(2, dtype=torch.bool), "m": torch.zeros(2)}

    def read(name: str) -> Tensor:
        asked.append(name)
        return tensors[name]

    save_checkpoint(specs_of(tensors), read, tmp_path, max_shard_bytes=1)
    assert asked == ["z", "a", "m"]


def test_a_tensor_other_than_announced_is_refused_and_no_file_stays(tmp_path: Path) -> None:
    specs = specs_of({"a": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"'a': announced \(3,\) torch.float32, got \(4,\) torch.float32"):
        save_checkpoint(specs, lambda name: torch.zeros(4), tmp_path, 100)
    assert list(tmp_path.iterdir()) == []


def test_weights_are_not_written_over_weights(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3), "b": torch.zeros(3)}
    folder = write_folder(tmp_path / "model", tensors, max_shard_bytes=1)
    with pytest.raises(OutputExistsError, match=r"holds weights already \(model-00001-of-00002\.safetensors\)"):
        save_checkpoint(specs_of(tensors), tensors.__getitem__, folder, 10**9)


def test_a_dtype_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'a' has dtype torch\.complex64"):
        save_tensors({"a": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "x.safetensors")


def test_a_failed_write_leaves_the_older_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors({"a": torch.ones(3)}, path)
    before = path.read_bytes()

    def fail(name: str) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        module._write_file(path, {"a": ((3,), torch.float32)}, fail, {})
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["x.safetensors"]


# ---- opening


def test_config_is_read_from_the_folder_and_empty_for_a_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", {"a": torch.zeros(3)})
    assert Checkpoint.open(folder).config == {}
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert Checkpoint.open(folder).config == {"model_type": "bert"}
    assert Checkpoint.open(folder / "model.safetensors").config == {}


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", {"a": torch.zeros(3, 4, dtype=torch.bfloat16)})
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
    folder = write_folder(tmp_path / "model", {"a": torch.zeros(3), "b": torch.zeros(3)}, max_shard_bytes=1)
    save_tensors({"a": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="one of them is stale, remove it"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("text", "words"), [("{", "is not valid JSON"), ("[1]", "must hold a JSON object, found list")]
)
def test_invalid_config_is_named(tmp_path: Path, text: str, words: str) -> None:
    folder = write_folder(tmp_path / "model", {"a": torch.zeros(3)})
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
    return write_folder(tmp_path / "model", {"a": torch.zeros(3), "b": torch.ones(3)}, max_shard_bytes=1)


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
