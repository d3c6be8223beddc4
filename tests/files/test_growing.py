"""Files that grow piece by piece: whole or beside their target, and the same bytes after a kill at any moment."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.files import kill_growing
from twinmerge.errors import InputError, OutputExistsError
from twinmerge.files import lock
from twinmerge.files.growing import CONTENT, JOURNAL, growing_file

F = {"twin": "abc", "limits": {"rows": 3}}


def interrupted(target: Path, pieces: int, fingerprint: dict[str, object] = F) -> Path:
    """A run that stopped after so many pieces; returns what it left."""
    with suppress(KeyError), growing_file(target, fingerprint) as growing:
        for number in range(pieces):
            growing.append(b"%d\n" % number, {"rows": number + 1})
        raise KeyError
    return target.with_name(f".{target.name}.partial")


def finish(target: Path, pieces: int, **settings: bool) -> int:
    """Go on to the end; returns the number of pieces that were there."""
    with growing_file(target, F, **settings) as growing:
        found = growing.note["rows"] if growing.note else 0
        if not growing.complete:
            for number in range(found, pieces):
                growing.append(b"%d\n" % number, {"rows": number + 1})
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    with growing_file(tmp_path / "out", F) as growing:
        growing.append(b"a\n", {})
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"a\n"


def test_an_exception_before_the_first_piece_leaves_nothing(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", 0)
    assert names(tmp_path) == []


def test_what_was_appended_stays_and_is_gone_on_with(tmp_path: Path) -> None:
    place = interrupted(tmp_path / "out", 3)
    assert names(tmp_path) == [place.name]
    assert finish(tmp_path / "out", 5, resume=True) == 3
    assert (tmp_path / "out").read_bytes() == b"0\n1\n2\n3\n4\n"
    assert names(tmp_path) == ["out"]


def test_resume_without_anything_left_starts_at_the_beginning(tmp_path: Path) -> None:
    assert finish(tmp_path / "out", 2, resume=True) == 0
    assert (tmp_path / "out").read_bytes() == b"0\n1\n"


@given(torn=st.binary(max_size=20), journal=st.binary(max_size=20).filter(lambda found: b"\n" not in found))
def test_what_was_cut_off_in_the_writing_is_written_again(
    tmp_path_factory: pytest.TempPathFactory, torn: bytes, journal: bytes
) -> None:
    target = tmp_path_factory.mktemp("growing") / "out"
    place = interrupted(target, 2)
    for name, more in ((CONTENT, torn), (JOURNAL, journal)):
        with (place / name).open("ab") as file:
            file.write(more)
    assert finish(target, 4, resume=True) == 2
    assert target.read_bytes() == b"0\n1\n2\n3\n"


def test_leftovers_are_not_lost_unless_it_is_said(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", 2)
    with pytest.raises(OutputExistsError, match=r"\.out\.partial holds what an interrupted run finished; say --resume"):
        finish(tmp_path / "out", 4)
    assert finish(tmp_path / "out", 4, overwrite=True) == 0
    assert names(tmp_path) == ["out"]


def test_leftovers_without_a_whole_piece_are_nothing(tmp_path: Path) -> None:
    place = tmp_path / ".out.partial"
    for journal in (b"", b'{"finger', b'{"fingerprint": {}}\n', b'{"fingerprint": {}}\n{"bytes": 2'):
        place.mkdir()
        (place / JOURNAL).write_bytes(journal)
        (place / CONTENT).write_bytes(b"0\n")
        assert finish(tmp_path / "out", 1) == 0
        assert names(tmp_path) == ["out"]
        (tmp_path / "out").unlink()


def test_a_file_that_exists_is_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for resume in (False, True):
        with pytest.raises(OutputExistsError, match=r"out exists already; name another file, or say --overwrite"):
            finish(tmp_path / "out", 1, resume=resume)
    assert names(tmp_path) == ["out"]
    interrupted(tmp_path / "other", 1)
    (tmp_path / ".other.partial").rename(tmp_path / ".out.partial")
    assert finish(tmp_path / "out", 2, overwrite=True, resume=True) == 1
    assert (tmp_path / "out").read_bytes() == b"0\n1\n"


def test_a_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError, match="out exists already"):
        finish(tmp_path / "out", 1, overwrite=True)


def test_the_targets_folder_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere is no folder; make it, or name another file"):
        finish(tmp_path / "nowhere" / "out", 1)


def test_other_settings_do_not_go_on_with_the_work(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", 1, {**F, "limits": {"rows": 4}})
    with pytest.raises(OutputExistsError, match=r"was left by a run with limits {'rows': 4}, this one has {'rows': 3}"):
        finish(tmp_path / "out", 2, resume=True)


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"0"), lambda file: file.unlink()])
def test_damaged_work_is_not_gone_on_with(tmp_path: Path, damage: object) -> None:
    damage(interrupted(tmp_path / "out", 2) / CONTENT)  # type: ignore[operator]
    with pytest.raises(OutputExistsError, match=r"content is not what the journal in .*\.out\.partial says"):
        finish(tmp_path / "out", 2, resume=True)


def test_a_run_killed_after_its_last_piece_needs_nothing_more(tmp_path: Path) -> None:
    """Before and after the file got its name."""
    target, place = tmp_path / "out", interrupted(tmp_path / "out", 2)
    with (place / JOURNAL).open("a") as journal:
        journal.write(json.dumps({"complete": True}) + "\n")
    kept = (place / JOURNAL).read_bytes()
    assert finish(target, 9, resume=True) == 2
    place.mkdir()
    (place / JOURNAL).write_bytes(kept)
    assert finish(target, 9, resume=True) == 2
    assert target.read_bytes() == b"0\n1\n"
    assert names(tmp_path) == ["out"]
    place.mkdir()
    (place / JOURNAL).write_bytes(kept)
    target.write_text("other")
    with pytest.raises(OutputExistsError, match=r"out is not what the journal in .* says was written"):
        finish(target, 9, resume=True)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    words = r"another process holds .*\.out\.lock"
    with growing_file(tmp_path / "out", F), pytest.raises(OutputExistsError, match=words):
        finish(tmp_path / "out", 1)
    with lock.only_process(tmp_path / "out"):
        assert names(tmp_path) == [".out.lock", "out"]


def test_a_kill_at_any_line_costs_no_byte(tmp_path: Path) -> None:
    """Every line of the module is a moment to be killed at; the children share nothing but the files."""
    script = [sys.executable, kill_growing.__file__, str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50  # kills
