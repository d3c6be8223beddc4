"""What is written is read back to the bit, by us and by safetensors, whole files and checkpoints filled in place."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import write_checkpoint
from twinmerge.errors import CheckpointError
from twinmerge.files import writer as module
from twinmerge.files.checkpoint import DTYPES, Checkpoint, TensorSpec
from twinmerge.files.writer import CheckpointWriter, save_tensors


def one_of_each_dtype() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {str(dtype): (torch.randn(3, 5, generator=generator) * 9).to(dtype) for dtype in DTYPES.values()}
    return {**tensors, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 7), "odd bool": torch.ones(3) > 0}


def same_bits(a: Tensor, b: Tensor) -> bool:
    def raw(x: Tensor) -> Tensor:
        return x.contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def spec(name: str, entries: int, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(name, (entries,), dtype, Path("unused"), 0)


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
    tensors = {
        name: torch.randn(shape).to(list(DTYPES.values())[i % 4]) for i, (name, shape) in enumerate(shapes.items())
    }
    folder = write_checkpoint(tmp_path_factory.mktemp("shards") / "model", tensors, max_shard_bytes)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.specs.keys() == tensors.keys()
    assert all(same_bits(checkpoint.read(name), tensors[name]) for name in tensors)


def test_rows_are_the_slice_of_the_tensor(tmp_path: Path) -> None:
    tensors = one_of_each_dtype()
    save_tensors(tensors, tmp_path / "x.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "x.safetensors")
    for dtype in map(str, DTYPES.values()):
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
    folder = write_checkpoint(tmp_path / "model", tensors, max_shard_bytes=80)
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
    folder = write_checkpoint(tmp_path / "model", {"a": torch.zeros(3)})
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]


def test_a_dtype_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'a' has dtype torch\.complex64"):
        save_tensors({"a": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "x.safetensors")


@given(order=st.permutations(range(5)), shard=st.integers(1, 200))
def test_stretches_written_in_any_order_are_the_tensors(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], shard: int
) -> None:
    folder = tmp_path_factory.mktemp("model")
    tensors = {"a": torch.randn(10), "b": torch.randn(10).bfloat16(), "empty": torch.zeros(0)}
    writer = CheckpointWriter.plan([spec(n, len(t), t.dtype) for n, t in tensors.items()], folder, "any", shard)
    writer.allocate()
    for name in ("a", "b"):
        for part in order:
            written = writer.write(name, 2 * part, tensors[name][2 * part : 2 * part + 2].clone())
            assert len(written) == 2 * tensors[name].dtype.itemsize
    writer.finish()
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) == writer.nbytes
    checkpoint = Checkpoint.open(folder)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_entries_beyond_the_planned_tensor_are_refused(tmp_path: Path) -> None:
    writer = CheckpointWriter.plan([spec("a", 3), spec("b", 3)], tmp_path)
    writer.allocate()
    for start, entries in ((0, 4), (2, 2), (-1, 1)):
        with pytest.raises(ValueError, match=r"'a' has 12 bytes, found \d+ from byte -?\d+"):
            writer.write("a", start, torch.ones(entries))


def test_a_failed_write_leaves_the_older_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors({"a": torch.ones(3)}, path)
    before = path.read_bytes()

    def fail(entries: Tensor) -> memoryview:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_bytes_of", fail)
    with pytest.raises(KeyboardInterrupt):
        save_tensors({"a": torch.zeros(3)}, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
