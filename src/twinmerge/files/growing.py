"""A file that grows beside its target, piece by piece, and is taken up after a crash; imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from twinmerge.errors import InputError, OutputExistsError
from twinmerge.files.lock import fsync, only_process

CONTENT, JOURNAL = "content", "journal"
_CHUNK = 1 << 20

Note = Mapping[str, Any]
"""Whatever JSON holds."""


class GrowingFile:
    """A file in work: what was appended to it is on disk, and stays there if the process is killed."""

    complete: bool
    """Whether an interrupted run had finished the file, so that nothing is to be appended."""
    note: Note | None
    """What the last append noted, None before the first."""

    def __init__(self, place: Path, fingerprint: Note, left: _Left | None) -> None:
        """Open the files of `place`; see `growing_file`."""
        self.complete = left is not None and left.complete
        self.note = left.note if left else None
        self._digest = left.digest if left else hashlib.sha256()
        self._bytes = left.bytes if left else 0
        if self.complete:
            return
        self._content = (place / CONTENT).open("r+b" if left else "wb")
        self._journal = (place / JOURNAL).open("r+b" if left else "wb")
        if left:
            self._content.truncate(self._bytes)
            self._content.seek(self._bytes)
            self._journal.truncate(_complete_bytes(self._journal.read()))
            self._journal.seek(0, os.SEEK_END)
        else:
            self._write_journal({"fingerprint": fingerprint})
            fsync(place)
            fsync(place.parent)

    def append(self, content: bytes, note: Note) -> None:
        """Append a piece and note what a later run must know to go on after it; both are on disk on return."""
        self._content.write(content)
        self._content.flush()
        os.fsync(self._content.fileno())
        self._digest.update(content)
        self._bytes += len(content)
        self._write_journal({"bytes": self._bytes, "sha256": self._digest.hexdigest(), "note": note})
        self.note = note

    def finish(self) -> None:
        """Note that nothing more will come."""
        self._write_journal({"complete": True})

    def close(self) -> None:
        """Close the files."""
        if not self.complete:
            self._content.close()
            self._journal.close()

    def _write_journal(self, entry: Note) -> None:
        self._journal.write(json.dumps(entry).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())


@contextmanager
def growing_file(
    target: Path, fingerprint: Note, *, overwrite: bool = False, resume: bool = False
) -> Iterator[GrowingFile]:
    """Write a file that appears under its name only when it is complete and on disk.

    What was appended before an exception or a kill stays beside the target, in the folder `.NAME.partial`; if that is
    nothing, the folder goes.

    Args:
        target: the file to write; its folder must exist.
        fingerprint: of everything its content depends on, as JSON holds it; the work of another is not gone on with.
        overwrite: replace the file, once the new one is complete, and what an interrupted run left.
        resume: go on with what an interrupted run left, if there is anything.

    Raises:
        InputError: if the target's folder is not there.
        OutputExistsError: if `target` exists and may not be replaced; if an interrupted run left work and nobody said
            what to do with it; if that work has another fingerprint or is damaged; if another process is writing it.
    """
    target = target.resolve()
    if not target.parent.is_dir():
        raise InputError(f"{target.parent} is no folder; make it, or name another file")
    place = target.with_name(f".{target.name}.partial")
    with only_process(target):
        left = _take_up(place, target, fingerprint, resume=resume) if resume or not overwrite else None
        published = left is not None and left.published
        if not published and target.exists() and not (overwrite and target.is_file()):
            raise OutputExistsError(f"{target} exists already; name another file, or say --overwrite")
        if left is None:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
        growing = GrowingFile(place, fingerprint, left)
        try:
            yield growing
            if not growing.complete:
                growing.finish()
            if not published:
                (place / CONTENT).replace(target)
                fsync(target.parent)
            shutil.rmtree(place)
        finally:
            growing.close()
            if growing.note is None:
                shutil.rmtree(place, ignore_errors=True)


def sha256_of_first(file: BinaryIO, count: int) -> Any:
    """The digest, still open, of the next `count` bytes of a file, or of what it has if that is less."""
    digest = hashlib.sha256()
    while count > 0 and (chunk := file.read(min(count, _CHUNK))):
        digest.update(chunk)
        count -= len(chunk)
    return digest


@dataclass(frozen=True)
class _Left:
    """What an interrupted run left."""

    bytes: int
    digest: Any
    note: Note
    complete: bool
    published: bool
    """The file has its name already; only the journal is left."""


def _take_up(place: Path, target: Path, fingerprint: Note, *, resume: bool) -> _Left | None:
    """What an interrupted run left, None if it finished no piece."""
    try:
        journal = (place / JOURNAL).read_bytes()
    except FileNotFoundError:
        return None
    entries = [json.loads(line) for line in journal[: _complete_bytes(journal)].splitlines()]
    complete = bool(entries) and "complete" in entries[-1]
    pieces = entries[1 : len(entries) - complete]
    if not pieces:
        return None
    if not resume:
        raise OutputExistsError(
            f"{place} holds what an interrupted run finished; say --resume to go on, or --overwrite to start anew"
        )
    before, last = entries[0]["fingerprint"], pieces[-1]
    anew = "say --overwrite without --resume to start anew"
    for key in sorted({*before, *fingerprint}):
        if before.get(key) != fingerprint.get(key):
            raise OutputExistsError(
                f"{place} was left by a run with {key} {before.get(key)!r}, this one has {fingerprint.get(key)!r}; "
                f"give the same, or {anew}"
            )
    content = place / CONTENT
    published = complete and not content.exists()
    file = target if published else content
    digest = hashlib.sha256()
    if file.is_file():
        with file.open("rb") as opened:
            digest = sha256_of_first(opened, last["bytes"])
    if digest.hexdigest() != last["sha256"]:
        raise OutputExistsError(f"{file} is not what the journal in {place} says was written; {anew}")
    return _Left(last["bytes"], digest, last["note"], complete, published)


def _complete_bytes(journal: bytes) -> int:
    """Without a last line that was cut off."""
    return journal.rfind(b"\n") + 1
