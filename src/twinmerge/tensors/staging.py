"""A folder that is filled beside its target, by one process at a time, and taken up again after a crash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from twinmerge.errors import OutputExistsError
from twinmerge.tensors.checkpoint import publish, require_free
from twinmerge.tensors.lock import only_process

JOURNAL = ".journal"


@dataclass(frozen=True)
class Staged:
    """The folder in work, and what an interrupted run finished in it."""

    folder: Path
    finished: Mapping[str, str]
    """Name of a part -> its SHA-256, to be verified before it is used."""

    def record(self, name: str, digest: str) -> None:
        """Note that a part is complete on disk."""
        with (self.folder / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps([name, digest]) + "\n")


@contextmanager
def resumable_folder(
    target: Path, fingerprint: str, *, overwrite: bool = False, resume: bool = False
) -> Iterator[Staged]:
    """Fill a folder that appears under its name only when it is complete and on disk.

    Unlike `staged_folder` a killed process leaves its work behind, and the next one may go on with it. Any exception
    removes it.

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
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.partial")
    with only_process(target):
        finished = _take_up(folder, fingerprint) if resume else {}
        if not finished:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            (folder / JOURNAL).write_text(json.dumps(["fingerprint", fingerprint]) + "\n", encoding="utf-8")
        try:
            yield Staged(folder, finished)
            (folder / JOURNAL).unlink()
            publish(folder, target, overwrite)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _take_up(folder: Path, fingerprint: str) -> dict[str, str]:
    """The parts that the journal says are finished; its last line may have been cut off."""
    try:
        first, *lines = (folder / JOURNAL).read_text(encoding="utf-8").splitlines(keepends=True)
    except (FileNotFoundError, ValueError):
        return {}
    if json.loads(first) != ["fingerprint", fingerprint]:
        raise OutputExistsError(
            f"{folder} was left by a run with another recipe or other inputs; run without --resume to start anew"
        )
    return dict(json.loads(line) for line in lines if line.endswith("\n"))
