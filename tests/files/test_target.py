"""Durable targets, folders and growing files: whole or beside their name, whatever ends the process."""

import ctypes
import json
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.files import kill_target
from twinmerge.errors import DataError, InputError, OutputExistsError, WorkerError
from twinmerge.files import target as module
from twinmerge.files.hashes import fingerprint_of
from twinmerge.files.target import (
    JOURNAL,
    RESULT,
    durable_folder,
    growing_file,
    only_process,
    require_free,
    require_space,
)

F: dict[str, Any] = {"twin": "abc", "limits": {"rows": 3}}
ENDS = [KeyboardInterrupt(), OSError(28, "No space left on device"), WorkerError("workers died"), RuntimeError("x")]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def interrupted_file(target: Path, pieces: int, error: BaseException = ENDS[0], **settings: Any) -> Path:
    """A run that stopped after so many pieces; returns what it left."""
    with suppress(type(error)), growing_file(target, settings.pop("fingerprint", F), **settings) as file:
        for number in range(pieces):
            file.append(b"%d\n" % number, {"rows": number + 1}, f"{number + 1} rows are")
        raise error
    return target.with_name(f".{target.name}.partial")


def finish_file(target: Path, pieces: int, **settings: bool) -> int:
    """Go on to the end; returns the number of pieces that were there."""
    with growing_file(target, F, **settings) as file:
        found = file.last["rows"] if file.last else 0
        if not file.complete:
            for number in range(found, pieces):
                file.append(b"%d\n" % number, {"rows": number + 1}, f"{number + 1} rows are")
    return found


def interrupted_folder(target: Path, parts: int, error: BaseException = ENDS[0], **settings: Any) -> Path:
    with suppress(type(error)), durable_folder(target, F, **settings) as folder:
        for number in range(parts):
            (folder.work / str(number)).write_text(str(number))
            folder.record(str(number), f"digest {number}")
        (folder.folder / "half").touch()
        raise error
    return target.with_name(f".{target.name}.partial")


def finish_folder(target: Path, **settings: Any) -> dict[str, str]:
    """Go on to the end; returns the parts that were there."""
    with durable_folder(target, F, **settings) as folder:
        found = dict(folder.finished)
        if not folder.complete:
            folder.clear()
            (folder.folder / "new").write_text("new")
    return found


def make_folder(target: Path, file: str = "old") -> Path:
    target.mkdir()
    (target / file).touch()
    return target


# ---- whole or not at all


def test_a_folder_appears_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    target = tmp_path / "made" / "on the way" / "twin"
    with durable_folder(target, F) as folder:
        (folder.folder / "experts").mkdir()
        (folder.folder / "experts" / "x").write_text("1")
        assert not target.exists()
    assert (target / "experts" / "x").read_text() == "1"
    assert names(target.parent) == ["twin"]


def test_a_file_appears_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    with growing_file(tmp_path / "out", F) as file:
        file.append(b"a\n", {}, "1 row is")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"a\n"


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_replaces_the_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(module, "_exchange", lambda *_: False)
    target = make_folder(tmp_path / "twin")
    with durable_folder(target, F, overwrite=True) as folder:
        (folder.folder / "new").touch()
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["twin"]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "renameat2"), reason="the system cannot exchange two names")
def test_the_name_of_a_folder_that_is_replaced_is_never_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("the name was free for a moment"))
    target = make_folder(tmp_path / "twin")
    finish_folder(target, overwrite=True)
    assert names(target) == ["new"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failing_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    target = tmp_path / "twin"
    if overwrite:
        make_folder(target)
    rename = Path.rename

    def fail_for_the_result(self: Path, to: Path) -> Path:
        if self.name == RESULT:
            raise OSError("disk on fire")
        return rename(self, to)

    monkeypatch.setattr(module, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", fail_for_the_result)
    with pytest.raises(OSError, match="on fire"):
        finish_folder(target, overwrite=overwrite)
    assert names(tmp_path) == (["twin"] if overwrite else [])
    assert not overwrite or names(target) == ["old"]


def test_an_old_folder_that_was_put_back_is_refused_like_any_other(tmp_path: Path) -> None:
    (tmp_path / ".out.replaced").mkdir()
    with pytest.raises(OutputExistsError, match="out exists already"):
        finish_folder(tmp_path / "out")
    assert names(tmp_path) == ["out"]


# ---- deleted on refusal, kept on failure


@pytest.mark.parametrize("error", ENDS, ids=repr)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_keeps_what_is_finished_says_so_and_leaves_the_target(
    tmp_path: Path, error: BaseException, overwrite: bool
) -> None:
    target, file = tmp_path / "twin", tmp_path / "file"
    if overwrite:
        make_folder(target)
        file.write_text("old")
    before = names(tmp_path)
    error.__notes__ = []
    interrupted_folder(target, 2, error, overwrite=overwrite)
    assert error.__notes__ == ["2 finished parts are kept: go on with --resume"]
    error.__notes__ = []
    interrupted_file(file, 3, error, overwrite=overwrite)
    assert error.__notes__ == ["3 rows are kept: go on with --resume"]
    assert names(tmp_path) == sorted([".twin.partial", ".file.partial", *before])
    assert not overwrite or (names(target), file.read_text()) == (["old"], "old")
    assert finish_folder(target, resume=True, overwrite=overwrite) == {"0": "digest 0", "1": "digest 1"}
    assert finish_file(file, 5, resume=True, overwrite=overwrite) == 3
    assert file.read_bytes() == b"0\n1\n2\n3\n4\n"
    assert names(target) == ["new"]
    assert names(tmp_path) == ["file", "twin"]


@pytest.mark.parametrize("error", [*ENDS, DataError("no")], ids=repr)
def test_where_nothing_is_finished_nothing_stays(tmp_path: Path, error: BaseException) -> None:
    error.__notes__ = []
    interrupted_folder(tmp_path / "a" / "b" / "out", 0, error)
    interrupted_file(tmp_path / "out", 0, error)
    assert names(tmp_path) == error.__notes__ == []


def test_a_refusal_removes_the_work_of_a_folder_and_keeps_the_verified_pieces_of_a_file(tmp_path: Path) -> None:
    """Mended inputs of a folder are others; what a file was made from is verified before it is gone on with."""
    interrupted_folder(tmp_path / "a" / "folder", 2, DataError("no"))
    interrupted_file(tmp_path / "file", 2, DataError("no"))
    assert names(tmp_path) == [".file.partial"]


def test_parents_that_were_made_go_with_the_failed_work_unless_they_are_used(tmp_path: Path) -> None:
    with suppress(KeyError), durable_folder(tmp_path / "a" / "b" / "out", F):
        (tmp_path / "a" / "mine").touch()
        raise KeyError
    assert names(tmp_path / "a") == ["mine"]


# ---- taken up again


def test_leftovers_are_not_lost_unless_it_is_said(tmp_path: Path) -> None:
    interrupted_file(tmp_path / "file", 2)
    interrupted_folder(tmp_path / "folder", 2)
    words = r"\.partial holds what an interrupted run finished; say --resume to go on, or --overwrite to start anew"
    with pytest.raises(OutputExistsError, match=words):
        finish_file(tmp_path / "file", 4)
    with pytest.raises(OutputExistsError, match=words):
        finish_folder(tmp_path / "folder")
    assert finish_file(tmp_path / "file", 4, overwrite=True) == 0
    assert finish_folder(tmp_path / "folder", overwrite=True) == {}
    assert names(tmp_path) == ["file", "folder"]


def test_resume_without_anything_left_starts_at_the_beginning(tmp_path: Path) -> None:
    assert finish_file(tmp_path / "file", 2, resume=True) == 0
    assert finish_folder(tmp_path / "folder", resume=True) == {}


def test_a_folder_in_place_starts_anew_unless_it_is_said(tmp_path: Path) -> None:
    target = make_folder(tmp_path / "out")
    interrupted_folder(target, 2, in_place=True)
    assert finish_folder(target, in_place=True, resume=True) == {"0": "digest 0", "1": "digest 1"}
    interrupted_folder(target, 2, in_place=True)
    assert finish_folder(target, in_place=True) == {}
    assert names(tmp_path) == ["out"]


@given(torn=st.binary(max_size=20), journal=st.binary(max_size=20).filter(lambda found: b"\n" not in found))
def test_what_was_cut_off_in_the_writing_is_written_again(
    tmp_path_factory: pytest.TempPathFactory, torn: bytes, journal: bytes
) -> None:
    root = tmp_path_factory.mktemp("torn")
    file, folder = interrupted_file(root / "file", 2), interrupted_folder(root / "folder", 2)
    for path, more in ((file / RESULT, torn), (file / JOURNAL, journal), (folder / JOURNAL, journal)):
        with path.open("ab") as opened:
            opened.write(more)
    assert finish_file(root / "file", 4, resume=True) == 2
    assert (root / "file").read_bytes() == b"0\n1\n2\n3\n"
    assert finish_folder(root / "folder", resume=True) == {"0": "digest 0", "1": "digest 1"}


def test_a_journal_that_was_cut_off_can_be_written_on(tmp_path: Path) -> None:
    place = interrupted_folder(tmp_path / "out", 1)
    with (place / JOURNAL).open("a") as journal:
        journal.write('["1", "di')
    with suppress(KeyError), durable_folder(tmp_path / "out", F, resume=True) as folder:
        folder.record("1", "digest 1")
        raise KeyError
    assert finish_folder(tmp_path / "out", resume=True) == {"0": "digest 0", "1": "digest 1"}


@pytest.mark.parametrize("journal", [b"", b'{"finger', b'{"fingerprint": {}}\n', b'{"fingerprint": {}}\n{"bytes": 2'])
@pytest.mark.parametrize("finish", [lambda target: finish_file(target, 1), finish_folder], ids=["file", "folder"])
def test_leftovers_without_a_finished_part_are_nothing(tmp_path: Path, journal: bytes, finish: Any) -> None:
    place = tmp_path / ".out.partial"
    place.mkdir()
    (place / JOURNAL).write_bytes(journal)
    (place / RESULT).write_bytes(b"0\n")
    finish(tmp_path / "out")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("journal", ['["fingerprint", "f"]\n["a", "1"]\n', 'no\n["a", "1"]\n'])
def test_a_journal_of_another_kind_is_refused_and_kept(tmp_path: Path, journal: str) -> None:
    place = tmp_path / ".out.partial"
    place.mkdir()
    (place / JOURNAL).write_text(journal)
    with pytest.raises(OutputExistsError, match=r"journal is damaged, or of another version; say --overwrite without"):
        finish_folder(tmp_path / "out", resume=True)
    assert (place / JOURNAL).read_text() == journal
    assert finish_folder(tmp_path / "out", overwrite=True) == {}


@pytest.mark.parametrize(
    ("fingerprint", "words"),
    [
        ({**F, "limits": {"rows": 4}}, r"with limits {'rows': 4}, this one has {'rows': 3}; say --overwrite without"),
        ({**F, "twin": "x" * 120}, "with another recipe or other inputs; say"),
        ({**F, "more": 1}, "with more 1, this one has None"),
        ({"limits": F["limits"]}, "with twin None, this one has 'abc'"),
    ],
)
def test_work_of_another_fingerprint_is_refused_and_kept(
    tmp_path: Path, fingerprint: dict[str, Any], words: str
) -> None:
    place = interrupted_file(tmp_path / "out", 1, fingerprint=fingerprint)
    with pytest.raises(OutputExistsError, match=rf"\.out\.partial was left by a run {words}"):
        finish_file(tmp_path / "out", 2, resume=True)
    assert (place / RESULT).read_bytes() == b"0\n"


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"0"), lambda file: file.unlink()])
def test_damaged_work_is_not_gone_on_with(tmp_path: Path, damage: Any) -> None:
    damage(interrupted_file(tmp_path / "out", 2) / RESULT)
    with pytest.raises(OutputExistsError, match=r"\.out\.partial/result is not what the journal beside it says"):
        finish_file(tmp_path / "out", 2, resume=True)


@pytest.mark.parametrize("kind", ["file", "folder", "exchanged", "renamed"])
def test_a_kill_at_any_line_costs_no_byte(tmp_path: Path, kind: str) -> None:
    """Every line of the module is a moment to be killed at; the children share nothing but the files."""
    script = [sys.executable, kill_target.__file__, str(tmp_path), kind]
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100  # kills


def kept_from_cleaning(patch: pytest.MonkeyPatch) -> None:
    """Killed after the result got its name."""
    remove = shutil.rmtree

    def keep(path: Path, **settings: bool) -> None:
        if path.suffix != ".partial" or not (path / JOURNAL).exists():
            remove(path, **settings)

    patch.setattr(shutil, "rmtree", keep)


def test_what_was_published_needs_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kept_from_cleaning(patch)
        finish_file(tmp_path / "file", 2)
        finish_folder(tmp_path / "folder")
    require_free(tmp_path / "folder", overwrite=False, resume=True)
    assert finish_file(tmp_path / "file", 9, resume=True) == 2
    assert finish_folder(tmp_path / "folder", resume=True) == {}
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_bytes() == b"0\n1\n"


def test_what_was_published_in_place_is_what_the_next_run_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make_folder(tmp_path / "out")
    with monkeypatch.context() as patch:
        kept_from_cleaning(patch)
        finish_folder(target, in_place=True)
    with durable_folder(target, F, in_place=True, resume=True) as folder:
        assert not folder.complete
    assert names(tmp_path) == ["out"]


def test_what_was_published_and_is_gone_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exchange left the old folder in the new one's place: it is not taken for the new one."""
    target = make_folder(tmp_path / "out")
    with monkeypatch.context() as patch:
        kept_from_cleaning(patch)
        finish_folder(target, overwrite=True)
    target.rename(tmp_path / "elsewhere")
    assert finish_folder(target, resume=True) == {}
    assert names(target) == ["new"]


# ---- the place


def test_what_exists_is_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    make_folder(tmp_path / "folder")
    words = r"exists already; choose another path, or overwrite it \(--overwrite\)$"
    for resume in (False, True):
        with pytest.raises(OutputExistsError, match=f"file {words}"):
            finish_file(tmp_path / "file", 1, resume=resume)
        with pytest.raises(OutputExistsError, match=f"folder {words}"):
            finish_folder(tmp_path / "folder", resume=resume)
    assert names(tmp_path) == ["file", "folder"]


def test_a_file_is_never_replaced_by_a_folder_nor_a_folder_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    make_folder(tmp_path / "folder")
    with pytest.raises(OutputExistsError, match="file exists already; it is a file; choose another path$"):
        finish_folder(tmp_path / "file", overwrite=True)
    with pytest.raises(OutputExistsError, match="folder exists already; it is a folder; choose another path$"):
        finish_file(tmp_path / "folder", 1, overwrite=True)


def test_a_target_that_appears_meanwhile_is_not_replaced_and_the_work_is_kept(tmp_path: Path) -> None:
    work = durable_folder(tmp_path / "twin", F)
    work.__enter__().record("a", "1")
    (tmp_path / "twin").mkdir()
    with pytest.raises(OutputExistsError, match="exists already") as caught:
        work.__exit__(None, None, None)
    assert caught.value.__notes__ == ["1 finished parts are kept: go on with --resume"]
    (tmp_path / "twin").rmdir()
    with durable_folder(tmp_path / "twin", F, resume=True) as folder:
        assert folder.complete
    assert names(tmp_path) == ["twin"]


def test_the_folder_of_a_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere is no folder; make it, or name another file"):
        finish_file(tmp_path / "nowhere" / "out", 1)


@pytest.mark.parametrize("work_on", [growing_file, durable_folder])
def test_one_process_at_a_time(tmp_path: Path, work_on: Any) -> None:
    words = r"another process holds .*\.out\.lock; wait for it to end"
    second = work_on(tmp_path / "out", F)
    with work_on(tmp_path / "out", F), pytest.raises(OutputExistsError, match=words):
        second.__enter__()
    with only_process(tmp_path / "out"):
        assert names(tmp_path) == [".out.lock", "out"]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_file_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    flock, calls = module.fcntl.flock, []

    def lose_the_file(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        calls.append(operation)
        if len(calls) == 1:
            (tmp_path / ".out.lock").unlink()
            if replaced:
                (tmp_path / ".out.lock").touch()

    monkeypatch.setattr(module.fcntl, "flock", lose_the_file)
    with only_process(tmp_path / "out"):
        assert len(calls) == 2


def test_a_full_disk_says_what_is_needed_and_free(tmp_path: Path) -> None:
    require_space(tmp_path, 0)
    with pytest.raises(OSError, match=r"1,000,000,000.00 GB are needed, [\d,.]+ GB are free"):
        require_space(tmp_path, 10**18)


def test_a_fingerprint_changes_with_settings_and_files(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.touch()
    before = fingerprint_of([file], seed=0)
    assert before == fingerprint_of([file, file], seed=0)
    assert json.loads(json.dumps(before)) == before
    assert before != fingerprint_of([file], seed=1)
    file.write_text("1")
    assert before != fingerprint_of([file], seed=0)
