"""SHA-256 of files, of their beginnings and headers, and of all that a result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

_CHUNK = 1 << 20


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal, read in chunks."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sha256_of_first(file: BinaryIO, count: int) -> Any:
    """The digest, still open, of the next `count` bytes of a file, or of what it has if that is less."""
    digest = hashlib.sha256()
    while count > 0 and (chunk := file.read(min(count, _CHUNK))):
        digest.update(chunk)
        count -= len(chunk)
    return digest


def header_sha256(file: Path) -> str:
    """SHA-256 of a safetensors file's header: the length and the JSON before the data."""
    with file.open("rb") as opened:
        length = opened.read(8)
        return hashlib.sha256(length + opened.read(int.from_bytes(length, "little"))).hexdigest()


def sha256_of_json(value: object) -> str:
    """SHA-256 of what JSON says of a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprint_of(files: Iterable[Path], **settings: object) -> dict[str, object]:
    """What a result depends on: settings, and the names, sizes and times of change of input files, as one hash."""
    inputs = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(set(files))]
    return {**settings, "inputs": sha256_of_json(inputs)}
