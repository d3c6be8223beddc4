"""Files filled in place, and folders that one process at a time fills."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinmerge.errors import CheckpointError, OutputExistsError
from twinmerge.tensors import lock
from twinmerge.tensors import staging as module
from twinmerge.tensors.checkpoint import Checkpoint, TensorSpec
from twinmerge.tensors.staging import resumable_folder
from twinmerge.tensors.writer import CheckpointWriter


def spec(name: str, entries: int, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(name, (entries,), dtype, Path("unused"), 0)


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
    writer.finish("any")
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) == writer.nbytes
    checkpoint = Checkpoint.open(folder)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_entries_are_the_slice_of_the_flattened_tensor_and_a_shorter_file_is_named(tmp_path: Path) -> None:
    writer = CheckpointWriter.plan([spec("a", 6)], tmp_path)
    writer.allocate()
    writer.write("a", 0, torch.arange(6.0))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.read_flat("a", 2, 5).tolist() == [2, 3, 4]
    assert checkpoint.read_flat("a", 2, 2).numel() == 0
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="'a' cannot be read: the file has become shorter"):
        checkpoint.read_flat("a", 0, 6)
    file.unlink()
    with pytest.raises(CheckpointError, match="'a' cannot be read: No such file"):
        checkpoint.read_flat("a", 0, 6)


def test_overlapping_tensors_are_damage(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="the data of tensor 'b' overlaps another's"):
        Checkpoint.open(tmp_path / "x.safetensors")


@given(noise=st.binary(max_size=40), at=st.integers(0, 60))
def test_any_damaged_header_is_an_error_of_ours_or_none(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int
) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    raw = len(header).to_bytes(8, "little") + header + bytes(8)
    file.write_bytes(raw[:at] + noise + raw[at + len(noise) :])
    with suppress(CheckpointError):
        checkpoint = Checkpoint.open(file)
        for name, found in checkpoint.specs.items():
            assert checkpoint.read_flat(name, 0, found.numel).numel() == found.numel


@pytest.mark.parametrize("names", [("diffusion_pytorch_model",), ("a", "b")])
def test_weights_of_another_name_are_found_if_there_is_one_set(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        CheckpointWriter.plan([spec("w", 2)], tmp_path, name).allocate()
    if len(names) == 1:
        assert Checkpoint.open(tmp_path).stem == "diffusion_pytorch_model"
    else:
        with pytest.raises(CheckpointError, match=r"holds several sets of weights \(a, b\); name one file"):
            Checkpoint.open(tmp_path)


def test_a_folder_appears_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    with resumable_folder(tmp_path / "out", "f") as staged:
        (staged.folder / "file").touch()
        staged.record("part", "digest")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), resumable_folder(tmp_path / "out", "f"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_work_is_taken_up_where_its_journal_is_whole(tmp_path: Path) -> None:
    work = tmp_path / ".out.partial"
    work.mkdir()
    (work / module.JOURNAL).write_text('["fingerprint", "f"]\n["a", "1"]\n["b", "2')
    with resumable_folder(tmp_path / "out", "f", resume=True) as staged:
        assert staged.finished == {"a": "1"}
    (work).mkdir()
    (work / module.JOURNAL).touch()
    with resumable_folder(tmp_path / "out", "f", resume=True, overwrite=True) as staged:
        assert staged.finished == {}


def test_one_folder_is_not_written_twice_at_a_time(tmp_path: Path) -> None:
    words = r"another process holds .*\.out\.lock; wait for it to end"
    second = resumable_folder(tmp_path / "out", "f")
    with resumable_folder(tmp_path / "out", "f"), pytest.raises(OutputExistsError, match=words):
        second.__enter__()
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_file_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    flock, calls = lock.fcntl.flock, []

    def lose_the_file(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        calls.append(operation)
        if len(calls) == 1:
            (tmp_path / ".out.lock").unlink()
            if replaced:
                (tmp_path / ".out.lock").touch()

    monkeypatch.setattr(lock.fcntl, "flock", lose_the_file)
    with resumable_folder(tmp_path / "out", "f"):
        assert len(calls) == 2
