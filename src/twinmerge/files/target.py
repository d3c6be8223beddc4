"""A durable place to write to, a folder or a growing file: one process, a journal, taken up again, published whole.

Work lies in `.NAME.partial` beside the target. It is deleted when what was asked is refused, and kept, as far as its
journal says that it is finished, whatever else ends the process: an interruption, a full disk, dead workers, a kill.
Imports nothing heavy.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from twinmerge.errors import InputError, OutputExistsError
from twinmerge.files.hashes import sha256_of_first

JOURNAL, RESULT, WORK = "journal", "result", "work"
"""What lies in the folder beside the target."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Linux: paths start from the working directory; both names stay."""
_ANEW = "say --overwrite without --resume to start anew"

Note = Mapping[str, Any]
"""Whatever JSON holds."""


class _Target:
    """A target in work, and what an interrupted run finished of it."""

    kept = ""
    """What a run that ends now leaves to go on with: "the answers of 20 rows are"; empty: nothing."""

    def __init__(self, place: Path, entries: list[Any], complete: bool) -> None:
        self.place = place
        self.complete = complete
        """Whether an interrupted run had finished, so that nothing is to be done."""
        new = place / f"{JOURNAL}.new"
        with new.open("wb") as journal:  # whole, so that nothing is appended to a line that was cut off
            journal.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
            journal.flush()
            os.fsync(journal.fileno())
        new.replace(place / JOURNAL)
        fsync(place)
        fsync(place.parent)

    @property
    def result(self) -> Path:
        """What will have the target's name."""
        return self.place / RESULT

    def note(self, entry: object) -> None:
        """Append to the journal; on return it is the system's, but perhaps not on the disk."""
        with (self.place / JOURNAL).open("ab") as journal:
            journal.write(json.dumps(entry).encode() + b"\n")

    def seal(self) -> None:
        """Note that nothing more will come, and the result's inode, by which it is known under either name."""
        self.note({"complete": self.result.stat().st_ino})
        fsync(self.place / JOURNAL)

    def put_in_place(self, target: Path) -> None:
        """Give the result the target's name."""
        self.result.replace(target)
        fsync(target.parent)

    def close(self) -> None:
        """Let go of open files."""

    def refuse(self) -> None:
        """Whatever was asked was refused."""


class Folder(_Target):
    """A folder in work."""

    def __init__(self, place: Path, entries: list[Any], complete: bool) -> None:
        """Take up what `entries` of the journal say, or begin; see `durable_folder`."""
        super().__init__(place, entries, complete)
        self.finished: dict[str, str] = dict(entries[1 : len(entries) - complete])
        """Name of a part that an interrupted run, or this one, finished -> its SHA-256, to be verified before use."""
        self._count()
        if not complete:
            for folder in (self.folder, self.work):
                folder.mkdir(exist_ok=True)

    @property
    def folder(self) -> Path:
        """What will appear under the target's name; exists."""
        return self.result

    @property
    def work(self) -> Path:
        """For files that only the work needs; exists, and outlives a crash."""
        return self.place / WORK

    def clear(self) -> None:
        """Empty the folder, which an interrupted run may have begun to fill: it is written anew from the parts."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def record(self, name: str, digest: str) -> None:
        """Note that a part is complete."""
        self.note([name, digest])
        self.finished[name] = digest
        self._count()

    def refuse(self) -> None:
        """The work of refused inputs is worth nothing: mended ones are others."""
        self.kept = ""

    def seal(self) -> None:
        """See `_Target.seal`."""
        for path, _, files in os.walk(self.folder):
            for file in files:
                fsync(Path(path, file))
            fsync(Path(path))
        super().seal()

    def put_in_place(self, target: Path) -> None:
        """Give the folder its name, in whose place it comes whole."""
        if target.exists() and _exchange(self.folder, target):
            fsync(target.parent)
            return
        old = _aside(target)
        if target.exists():
            target.rename(old)
        try:
            self.folder.rename(target)
        except BaseException:
            _recover(target)
            raise
        fsync(target.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _count(self) -> None:
        self.kept = f"{len(self.finished):,} finished parts are" if self.finished else ""


class GrowingFile(_Target):
    """A file in work: what was appended to it is on disk, and stays there whatever ends the process.

    A refusal keeps it too: what it was made from is verified before it is gone on with.
    """

    def __init__(self, place: Path, entries: list[Any], complete: bool) -> None:
        """Open the file where the last of `entries` ends; see `growing_file`."""
        super().__init__(place, entries, complete)
        last: dict[str, Any] = entries[-1 - complete] if len(entries) > 1 else {}
        self.last: Note | None = last.get("note")
        """What the last append noted, None before the first."""
        self.kept = last.get("kept", "")
        if complete:
            return
        self.result.touch()
        with self.result.open("rb") as opened:
            self._digest = sha256_of_first(opened, last.get("bytes", 0))
        if self._digest.hexdigest() != last.get("sha256", self._digest.hexdigest()):
            raise OutputExistsError(f"{self.result} is not what the journal beside it says was written; {_ANEW}")
        self._file = self.result.open("r+b", buffering=0)
        self._file.seek(last.get("bytes", 0))
        self._file.truncate()
        self._journal = (place / JOURNAL).open("ab", buffering=0)

    def append(self, content: bytes, note: Note, kept: str) -> None:
        """Append a piece and note what a later run must know to go on after it; both are on disk on return.

        Args:
            content: the piece.
            note: for `last`.
            kept: what there is now, for whoever is interrupted: "the answers of 20 rows are".
        """
        _write(self._file, content)
        self._digest.update(content)
        self.note({"bytes": self._file.tell(), "sha256": self._digest.hexdigest(), "note": note, "kept": kept})
        self.last, self.kept = note, kept

    def note(self, entry: object) -> None:
        """Append to the journal, on the disk."""
        _write(self._journal, json.dumps(entry).encode() + b"\n")

    def close(self) -> None:
        """Let go of open files."""
        if not self.complete:
            self._file.close()
            self._journal.close()


def _write(file: FileIO, content: bytes) -> None:
    """All of it, to the disk."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
    os.fsync(file.fileno())


Kind = TypeVar("Kind", Folder, GrowingFile)


@contextmanager
def durable_folder(
    target: Path, fingerprint: Note, *, overwrite: bool = False, resume: bool = False, in_place: bool = False
) -> Iterator[Folder]:
    """Fill a folder that appears under its name only when it is complete and on disk.

    Args:
        target: the folder to write; its parents are created.
        fingerprint: everything the result depends on, as JSON holds it; work of another is not gone on with.
        overwrite: replace an existing folder once the new one is complete, and drop what an interrupted run left.
        resume: go on with what an interrupted run left, if there is anything.
        in_place: the target is what the work starts from; it is there, and is replaced.

    Raises:
        OutputExistsError: if `target` exists and may not be replaced; if an interrupted run left work and nobody said
            what to do with it; if that work has another fingerprint or is damaged; if another process is writing it.
    """
    target = target.resolve()
    require_free(target, overwrite=overwrite or in_place, resume=resume)
    with _existing(target.parent), only_process(target):
        _recover(target)
        with _in_work(Folder, target, fingerprint, overwrite, resume, in_place) as folder:
            yield folder


@contextmanager
def growing_file(
    target: Path, fingerprint: Note, *, overwrite: bool = False, resume: bool = False
) -> Iterator[GrowingFile]:
    """Write a file, piece by piece, that appears under its name only when it is complete and on disk.

    Args:
        target: the file to write; its folder must exist.
        fingerprint: as for `durable_folder`.
        overwrite: as for `durable_folder`; a folder is not replaced.
        resume: as for `durable_folder`.

    Raises:
        InputError: if the target's folder is not there.
        OutputExistsError: as for `durable_folder`.
    """
    target = target.resolve()
    if not target.parent.is_dir():
        raise InputError(f"{target.parent} is no folder; make it, or name another file")
    with only_process(target), _in_work(GrowingFile, target, fingerprint, overwrite, resume, False) as file:
        yield file


@contextmanager
def _in_work(
    kind: type[Kind], target: Path, fingerprint: Note, overwrite: bool, resume: bool, in_place: bool
) -> Iterator[Kind]:
    """The life of a target whose lock is held."""
    place = _partial(target)
    entries = _take_up(place, fingerprint, resume=resume, drop=overwrite or in_place)
    complete = bool(entries) and isinstance(entries[-1], dict) and "complete" in entries[-1]
    published = complete and _is(target, entries[-1]["complete"])
    if complete and (published if in_place else not published and not _is(place / RESULT, entries[-1]["complete"])):
        entries, complete, published = [], False, False  # gone, or what was asked of the old one is asked of the new
    if not published:
        _require_free(target, overwrite or in_place, folder=kind is Folder)
    if not entries:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    work = kind(place, entries or [{"fingerprint": fingerprint}], complete)
    try:
        try:
            yield work
        except InputError:
            work.refuse()
            raise
        if not complete:
            work.seal()
        if not published:
            _require_free(target, overwrite or in_place, folder=kind is Folder)
            work.put_in_place(target)
        shutil.rmtree(place)
    except BaseException as error:
        if work.kept:
            error.add_note(f"{work.kept} kept: go on with --resume")
        else:
            shutil.rmtree(place, ignore_errors=True)
        raise
    finally:
        work.close()


def require_free(target: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse a folder that exists and may not be replaced, before anything is read.

    Raises:
        OutputExistsError: saying what is there.
    """
    if not (resume and _partial(target.resolve()).exists()):  # it may have been killed after it was published
        _require_free(target, overwrite, folder=True)


def _require_free(target: Path, overwrite: bool, *, folder: bool) -> None:
    if target.exists() and not (overwrite and target.is_dir() == folder):
        other = "" if target.is_dir() == folder else f"it is a {'file' if folder else 'folder'}; "
        more = "" if other else ", or overwrite it (--overwrite)"
        raise OutputExistsError(f"{target} exists already; {other}choose another path{more}")


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse work whose files the disk cannot hold.

    Raises:
        OSError: saying what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(28, f"{needed_bytes / 1e9:,.2f} GB are needed, {free / 1e9:,.2f} GB are free", str(folder.parent))


def size_of(folder: Path) -> int:
    """Bytes of the files that lie in a folder itself."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _is(path: Path, inode: int) -> bool:
    return path.exists() and path.stat().st_ino == inode


def _take_up(place: Path, fingerprint: Note, *, resume: bool, drop: bool) -> list[Any]:
    """The journal of what an interrupted run left, without a last line that was cut off; empty if it finished nothing.

    Raises:
        OutputExistsError: if there is something that nobody said to go on with or to drop, or that is not of this run.
    """
    try:
        journal = (place / JOURNAL).read_bytes()
    except FileNotFoundError:
        return []
    try:
        first, *entries = [json.loads(line) for line in journal[: journal.rfind(b"\n") + 1].splitlines()] or [None]
    except ValueError:
        first, entries = None, [journal]
    if not entries or (drop and not resume):
        return []
    if not resume:
        raise OutputExistsError(
            f"{place} holds what an interrupted run finished; say --resume to go on, or --overwrite to start anew"
        )
    if not isinstance(first, dict):
        raise OutputExistsError(f"{place / JOURNAL} is damaged, or of another version; {_ANEW}")
    before: Note = first["fingerprint"]
    now: Note = json.loads(json.dumps(fingerprint))
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            old, new = repr(before.get(key)), repr(now.get(key))
            readable = max(len(old), len(new)) < 60
            told = f"{key} {old}, this one has {new}" if readable else "another recipe or other inputs"
            raise OutputExistsError(f"{place} was left by a run with {told}; {_ANEW}")
    return [first, *entries]


@contextmanager
def only_process(target: Path) -> Iterator[None]:
    """Hold the lock of a target; it goes with the process, however that ends.

    Raises:
        OutputExistsError: if another process holds it.
    """
    path = target.with_name(f".{target.name}.lock")
    descriptor = _lock(path)
    while descriptor is None:  # the last holder removed the file between our opening and our locking it
        descriptor = _lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(path.stat(), os.fstat(descriptor)):
            return descriptor
    except BlockingIOError as error:
        os.close(descriptor)
        raise OutputExistsError(f"another process holds {path}; wait for it to end") from error
    except FileNotFoundError:
        pass
    os.close(descriptor)
    return None


def fsync(path: Path) -> None:
    """Bring a file or the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
