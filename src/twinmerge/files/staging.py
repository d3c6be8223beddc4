"""A folder that is filled beside its target, by one process at a time, and taken up again after a crash."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from twinmerge.errors import OutputExistsError
from twinmerge.files.lock import fsync, only_process

JOURNAL, RESULT, WORK = "journal", "result", "work"
"""What lies in the folder beside the target."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Linux: paths start from the working directory; both names stay."""


@dataclass(frozen=True)
class Staged:
    """A folder in work, and what an interrupted run finished in it."""

    place: Path
    finished: Mapping[str, str]
    """Name of a part -> its SHA-256, to be verified before it is used."""

    @property
    def folder(self) -> Path:
        """What will appear under the target's name; exists."""
        return self.place / RESULT

    @property
    def work(self) -> Path:
        """For files that only the work needs; exists, and outlives a crash."""
        return self.place / WORK

    def record(self, name: str, digest: str) -> None:
        """Note that a part is complete on disk."""
        with (self.place / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps([name, digest]) + "\n")


@contextmanager
def resumable_folder(
    target: Path, fingerprint: str, *, overwrite: bool = False, resume: bool = False
) -> Iterator[Staged]:
    """Fill a folder that appears under its name only when it is complete and on disk.

    A killed process leaves its work behind, and the next one may go on with it. Any exception removes it, and the
    parents that were made for it.

    Args:
        target: the folder to write; its parents are created.
        fingerprint: of everything the result depends on; work of another fingerprint is not gone on with.
        overwrite: replace an existing folder once the new one is complete.
        resume: go on with what an interrupted process left, if there is anything.

    Raises:
        OutputExistsError: if `target` exists and may not be replaced, if another process is writing it, or if what
            an interrupted process left is not of this fingerprint.
    """
    target = target.resolve()
    require_free(target, overwrite)
    place = target.with_name(f".{target.name}.partial")
    with _existing(target.parent), only_process(target):
        _recover(target)
        require_free(target, overwrite)
        finished = _take_up(place, fingerprint) if resume else {}
        if not finished:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
        _write_journal(place, fingerprint, finished)
        staged = Staged(place, finished)
        try:
            for folder in (staged.folder, staged.work):
                folder.mkdir(exist_ok=True)
            yield staged
            _fsync_all(staged.folder)
            require_free(target, overwrite)
            (place / JOURNAL).unlink()
            _put_in_place(staged.folder, target)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def require_free(target: Path, overwrite: bool) -> None:
    """Refuse a target that exists and may not be replaced.

    Raises:
        OutputExistsError: saying what is there.
    """
    if target.exists() and not (overwrite and target.is_dir()):
        hint = "choose another path, or overwrite it" if target.is_dir() else "it is a file; choose another path"
        raise OutputExistsError(f"{target} exists already; {hint}")


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse work whose files the disk cannot hold.

    Raises:
        OSError: saying what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(28, f"{needed_bytes / 1e9:,.2f} GB are needed, {free / 1e9:,.2f} GB are free", str(folder.parent))


def fingerprint_of(settings: object, files: Iterable[Path]) -> str:
    """One hash of what JSON says of `settings` and of the names, sizes and times of change of input files."""
    inputs = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(set(files))]
    return hashlib.sha256(json.dumps([settings, inputs]).encode()).hexdigest()


def _take_up(place: Path, fingerprint: str) -> dict[str, str]:
    """The parts that the journal says are finished; its last line may have been cut off."""
    try:
        first, *lines = (place / JOURNAL).read_text(encoding="utf-8").splitlines(keepends=True)
    except (FileNotFoundError, ValueError):
        return {}
    if json.loads(first) != ["fingerprint", fingerprint]:
        raise OutputExistsError(
            f"{place} was left by a run with another recipe or other inputs; run without --resume to start anew"
        )
    return dict(json.loads(line) for line in lines if line.endswith("\n"))


def _write_journal(place: Path, fingerprint: str, finished: Mapping[str, str]) -> None:
    """Whole, so that nothing is appended to a line that was cut off."""
    new = place / f"{JOURNAL}.new"
    lines = [["fingerprint", fingerprint], *finished.items()]
    new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    new.replace(place / JOURNAL)


def _put_in_place(folder: Path, target: Path) -> None:
    """Give a complete folder the name of its target, in whose place it comes whole."""
    if target.exists() and _exchange(folder, target):
        fsync(target.parent)
        return
    old = _aside(target)
    if target.exists():
        target.rename(old)
    try:
        folder.rename(target)
    except BaseException:
        _recover(target)
        raise
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders swap names in one step, so that neither name is ever free; not every system can."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and not rename(
        _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE
    )


def _aside(target: Path) -> Path:
    """Where the old folder waits until the new one has its name."""
    return target.with_name(f".{target.name}.replaced")


def _recover(target: Path) -> None:
    """Put the old folder back if a process died after it had set it aside, or clear it away if the new one is there."""
    old = _aside(target)
    if not target.exists() and old.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _existing(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; on an exception those that were made and are empty go again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):  # not empty: an interrupted run's work, or another process's
                path.rmdir()
        raise


def _fsync_all(folder: Path) -> None:
    for path, _, files in os.walk(folder):
        for file in files:
            fsync(Path(path, file))
        fsync(Path(path))
