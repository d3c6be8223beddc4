"""Files filled in place, and folders that one process at a time fills."""

import ctypes
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinmerge.errors import CheckpointError, OutputExistsError
from twinmerge.files import lock
from twinmerge.files import staging as module
from twinmerge.files.checkpoint import Checkpoint, TensorSpec
from twinmerge.files.staging import fingerprint_of, require_space, resumable_folder
from twinmerge.files.writer import CheckpointWriter


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


# ---- folders


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_staged_folder_appears_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "made" / "on the way" / "twin"
    with resumable_folder(target, "f") as staged:
        (staged.folder / "experts").mkdir()
        (staged.folder / "experts" / "x").write_text("1")
        assert not target.exists()
        assert staged.place.parent == target.parent
    assert (target / "experts" / "x").read_text() == "1"
    assert names_in(target.parent) == ["twin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_removes_the_staged_folder_and_keeps_the_target(
    tmp_path: Path, error: type[BaseException], overwrite: bool
) -> None:
    target = tmp_path / "twin"
    if overwrite:
        target.mkdir()
        (target / "old").touch()

    def fail_half_way() -> None:
        with resumable_folder(target, "f", overwrite=overwrite) as staged:
            (staged.folder / "new").touch()
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert names_in(tmp_path) == (["twin"] if overwrite else [])
    assert not overwrite or names_in(target) == ["old"]


def test_existing_target_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="exists already; choose another path, or overwrite it"):
        resumable_folder(tmp_path, "f").__enter__()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_replaces_the_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(module, "_exchange", lambda *_: False)
    target = tmp_path / "twin"
    target.mkdir()
    (target / "old").touch()
    with resumable_folder(target, "f", overwrite=True) as staged:
        (staged.folder / "new").touch()
        assert names_in(target) == ["old"]
    assert names_in(target) == ["new"]
    assert names_in(tmp_path) == ["twin"]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "renameat2"), reason="the system cannot exchange two names")
def test_the_name_of_a_folder_that_is_replaced_is_never_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("the name was free for a moment"))
    (tmp_path / "twin").mkdir()
    with resumable_folder(tmp_path / "twin", "f", overwrite=True) as staged:
        (staged.folder / "new").touch()
    assert names_in(tmp_path / "twin") == ["new"]


def test_a_file_is_never_overwritten_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(OutputExistsError, match="it is a file"):
        resumable_folder(tmp_path / "notes", "f", overwrite=True).__enter__()


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "twin"
    with pytest.raises(OutputExistsError), resumable_folder(target, "f"):
        target.mkdir()
    assert names_in(tmp_path) == ["twin"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failing_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    target = tmp_path / "twin"
    if overwrite:
        target.mkdir()
        (target / "old").touch()
    rename = Path.rename

    def fail_for_staging(self: Path, to: Path) -> Path:
        if self.name == module.RESULT:
            raise OSError("disk on fire")
        return rename(self, to)

    monkeypatch.setattr(module, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", fail_for_staging)
    with pytest.raises(OSError, match="on fire"), resumable_folder(target, "f", overwrite=overwrite):
        pass
    assert names_in(tmp_path) == (["twin"] if overwrite else [])
    assert not overwrite or names_in(target) == ["old"]


def test_work_is_taken_up_where_its_journal_is_whole(tmp_path: Path) -> None:
    work = tmp_path / ".out.partial"
    work.mkdir()
    (work / module.JOURNAL).write_text('["fingerprint", "f"]\n["a", "1"]\n["b", "2')
    with resumable_folder(tmp_path / "out", "f", resume=True) as staged:
        assert staged.finished == {"a": "1"}
    work.mkdir()
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


def failing_work(target: Path, used: Path | None = None, **settings: bool) -> Mapping[str, str]:
    """What work that stops at once finds done."""
    with suppress(KeyError), resumable_folder(target, "f", **settings) as staged:
        if used:
            used.touch()
        raise KeyError
    return staged.finished


PROGRAM = """
import os, signal, sys
from pathlib import Path
from twinmerge.files import staging
moment, rename = int(sys.argv[2]), Path.rename
def step():
    global moment
    moment -= 1
    if moment < 0:
        os.kill(os.getpid(), signal.SIGKILL)
def stepped(self, to):
    step()
    rename(self, to)
    step()
staging._exchange = lambda *_: False
Path.rename = stepped
with staging.resumable_folder(Path(sys.argv[1]), "f", overwrite=True) as staged:
    (staged.folder / "new").touch()
    (staged.work / "part").touch()
    staged.record("part", "digest")
    step()
"""


@pytest.mark.parametrize(("moment", "left"), [(0, ["old"]), (1, ["old"]), (2, None), (3, None), (4, ["new"])])
def test_a_process_killed_while_it_replaces_a_folder_leaves_the_old_or_the_new_one(
    tmp_path: Path, moment: int, left: list[str] | None
) -> None:
    """On a system that cannot exchange names; where neither folder has the name the next run puts the old one back."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(target), str(moment)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert (names_in(target) if target.exists() else None) == left
    assert failing_work(target, overwrite=True, resume=True) == ({"part": "digest"} if moment == 0 else {})
    assert names_in(tmp_path) == ["out"]
    assert names_in(target) == (left or ["old"])


def test_an_old_folder_that_was_put_back_is_refused_like_any_other(tmp_path: Path) -> None:
    (tmp_path / ".out.replaced").mkdir()
    with pytest.raises(OutputExistsError, match="out exists already"):
        resumable_folder(tmp_path / "out", "f").__enter__()
    assert names_in(tmp_path) == ["out"]


def test_parents_that_were_made_go_with_the_failed_work_unless_they_are_used(tmp_path: Path) -> None:
    failing_work(tmp_path / "a" / "b" / "out")
    assert names_in(tmp_path) == []
    failing_work(tmp_path / "a" / "b" / "out", used=tmp_path / "a" / "mine")
    assert names_in(tmp_path / "a") == ["mine"]


def test_a_journal_that_was_cut_off_can_be_written_on(tmp_path: Path) -> None:
    place = tmp_path / ".out.partial"
    place.mkdir()
    (place / module.JOURNAL).write_text('["fingerprint", "f"]\n["a", "1"]\n["b", "2')
    with resumable_folder(tmp_path / "out", "f", resume=True) as staged:
        staged.record("b", "3")
        assert module._take_up(place, "f") == {"a": "1", "b": "3"}


def test_a_fingerprint_changes_with_settings_and_files(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.touch()
    before = fingerprint_of({"seed": 0}, [file])
    assert before == fingerprint_of({"seed": 0}, [file, file])
    assert before != fingerprint_of({"seed": 1}, [file])
    file.write_text("1")
    assert before != fingerprint_of({"seed": 0}, [file])


def test_work_of_another_fingerprint_is_refused_and_kept(tmp_path: Path) -> None:
    place = tmp_path / ".out.partial"
    place.mkdir()
    (place / module.JOURNAL).write_text('["fingerprint", "another"]\n')
    with pytest.raises(OutputExistsError, match="left by a run with another recipe"):
        resumable_folder(tmp_path / "out", "f", resume=True).__enter__()
    assert names_in(tmp_path) == [".out.partial"]


def test_a_full_disk_says_what_is_needed_and_free(tmp_path: Path) -> None:
    require_space(tmp_path, 0)
    with pytest.raises(OSError, match=r"1,000,000,000.00 GB are needed, [\d,.]+ GB are free"):
        require_space(tmp_path, 10**18)
