"""Writes safetensors: one file whole or not at all, or a checkpoint's files in place, in any order, from any thread."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from twinmerge.errors import CheckpointError
from twinmerge.files.checkpoint import DTYPES, TensorSpec, size_bytes
from twinmerge.files.target import fsync

MAX_SHARD_BYTES = 5 * 10**9
_DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


def save_tensors(
    tensors: Mapping[str, Shaped[Tensor, "..."]], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file, whole or not at all.

    Args:
        tensors: what to write, by name; tensors that share memory are written once each.
        path: the file, replaced if it exists.
        metadata: goes into the header beside `format: pt`.

    Raises:
        CheckpointError: if a dtype has no name in the safetensors format.
    """
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    head, offsets, size = _lay_out(layout, metadata or {})
    staging = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with staging.open("wb") as opened:
            opened.write(head)
            opened.truncate(size)
            for name, tensor in tensors.items():
                opened.seek(offsets[name])
                opened.write(_bytes_of(tensor.detach().cpu().contiguous().reshape(-1)))
            opened.flush()
            os.fsync(opened.fileno())
        staging.replace(path)
        fsync(path.parent)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class CheckpointWriter:
    """The files of a checkpoint to be filled; picklable, so that other processes can fill them too."""

    folder: Path
    stem: str
    places: Mapping[str, tuple[str, int, int]]
    """Name -> file, first byte, bytes."""
    heads: Mapping[str, tuple[bytes, int]]
    """File -> its header and its size in bytes."""

    @classmethod
    def plan(
        cls, specs: Iterable[TensorSpec], folder: Path, stem: str = "model", max_shard_bytes: int | None = None
    ) -> CheckpointWriter:
        """Lay out all files without touching the disk.

        Args:
            specs: names, shapes and dtypes (`file`, `nbytes` and `offset` are not used).
            folder: an existing folder.
            stem: the files' common name, `model` for transformers.
            max_shard_bytes: bytes of tensors per file, None for `MAX_SHARD_BYTES`; a larger tensor gets a file of its
                own.

        Raises:
            CheckpointError: if a dtype has no name in the safetensors format.
        """
        layout = {spec.name: (spec.shape, spec.dtype) for spec in specs}
        sizes = {name: size_bytes(*entry) for name, entry in layout.items()}
        shards = _plan_shards(sizes, max_shard_bytes or MAX_SHARD_BYTES)
        places: dict[str, tuple[str, int, int]] = {}
        heads: dict[str, tuple[bytes, int]] = {}
        for number, names in enumerate(shards, start=1):
            part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = f"{stem}{part}.safetensors"
            head, offsets, size = _lay_out({name: layout[name] for name in names}, {})
            heads[file] = head, size
            places |= {name: (file, offsets[name], sizes[name]) for name in names}
        return cls(folder, stem, places, heads)

    @property
    def nbytes(self) -> int:
        """Bytes of all files, headers included."""
        return sum(size for _, size in self.heads.values())

    def allocate(self) -> None:
        """Create the files in their full size; what lies in files of that size already is kept.

        Raises:
            OSError: if the disk has no room for them.
        """
        for file, (head, size) in self.heads.items():
            (self.folder / file).touch()
            with (self.folder / file).open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, size)
                opened.truncate(size)
                opened.write(head)

    def write(self, name: str, start: int, entries: Shaped[Tensor, " entries"]) -> memoryview:
        """Write entries of a flattened tensor, the first at entry `start`; gives the bytes that were written.

        Raises:
            ValueError: if the tensor that was planned does not hold them.
        """
        written = _bytes_of(entries)
        file, offset, size = self.places[name]
        at, rest = start * entries.dtype.itemsize, written
        if not 0 <= at <= at + len(written) <= size:
            raise ValueError(f"{name!r} has {size} bytes, found {len(written)} from byte {at}")
        at += offset
        with (self.folder / file).open("r+b", buffering=0) as opened:
            while rest:
                count = os.pwrite(opened.fileno(), rest, at)
                rest, at = rest[count:], at + count
        return written

    def finish(self) -> None:
        """Write the index, if there is more than one file."""
        if len(self.heads) > 1:
            index = {
                "metadata": {"total_size": sum(size for _, _, size in self.places.values())},
                "weight_map": {name: file for name, (file, _, _) in self.places.items()},
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.folder / f"{self.stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy config, tokenizer and processor files of a model folder, not its weights."""
    for path in sorted(source.iterdir()):
        side = path.suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken") and not path.name.endswith(
            ".index.json"
        )
        if path.is_file() and side and path.name != "twin.json":
            shutil.copyfile(path, folder / path.name)


def _bytes_of(entries: Tensor) -> memoryview:
    view: memoryview = entries.view(torch.uint8).numpy().data
    return view


def _lay_out(
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """The header of a safetensors file that holds `layout`, each tensor's first byte, and the file's size in bytes.

    Raises:
        CheckpointError: if a dtype has no name in the safetensors format.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in sorted(layout, key=lambda name: (-layout[name][1].itemsize, name)):  # widest first: all are aligned
        shape, dtype = layout[name]
        if dtype not in _DTYPE_NAMES:
            raise CheckpointError(f"tensor {name!r} has dtype {dtype}, which a safetensors file cannot hold here")
        begin, end = end, end + size_bytes(shape, dtype)
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    data = 8 + len(encoded)
    offsets = {name: data + header[name]["data_offsets"][0] for name in layout}
    return len(encoded).to_bytes(8, "little") + encoded, offsets, data + end


def _plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names by file, in their order; a tensor larger than the limit gets a file of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
