"""Knows how one process at a time works on a target, and how it comes to the disk; imports nothing heavy."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twinmerge.errors import OutputExistsError


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
