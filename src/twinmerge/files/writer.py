"""Safetensors files that exist in full size from the start and are filled in place, in any order, from any thread."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor

from twinmerge.files.checkpoint import TensorSpec, lay_out, plan_shards

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class CheckpointWriter:
    """The files of a checkpoint to be filled; picklable, so that other processes can fill them too."""

    folder: Path
    places: Mapping[str, tuple[str, int, int]]
    """Name -> file, first byte, bytes."""
    heads: Mapping[str, tuple[bytes, int]]
    """File -> its header and its size in bytes."""

    @classmethod
    def plan(
        cls, specs: Iterable[TensorSpec], folder: Path, stem: str = "model", max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> CheckpointWriter:
        """Lay out all files without touching the disk.

        Args:
            specs: names, shapes and dtypes (`file`, `nbytes` and `offset` are not used).
            folder: an existing folder.
            stem: the files' common name, `model` for transformers.
            max_shard_bytes: bytes of tensors per file; a larger tensor gets a file of its own.

        Raises:
            CheckpointError: if a dtype has no name in the safetensors format.
        """
        layout = {spec.name: (spec.shape, spec.dtype) for spec in specs}
        sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in layout.items()}
        shards = plan_shards(sizes, max_shard_bytes)
        places: dict[str, tuple[str, int, int]] = {}
        heads: dict[str, tuple[bytes, int]] = {}
        for number, names in enumerate(shards, start=1):
            part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = f"{stem}{part}.safetensors"
            head, offsets, size = lay_out({name: layout[name] for name in names}, {})
            heads[file] = head, size
            places |= {name: (file, offset, sizes[name]) for name, offset in offsets.items()}
        return cls(folder, places, heads)

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
        """Write entries of a flattened tensor, the first at entry `start`; gives the bytes that were written."""
        written = entries.view(torch.uint8).numpy().data
        file, offset, _ = self.places[name]
        at, rest = offset + start * entries.dtype.itemsize, written
        with (self.folder / file).open("r+b", buffering=0) as opened:
            while rest:
                count = os.pwrite(opened.fileno(), rest, at)
                rest, at = rest[count:], at + count
        return written

    def finish(self, stem: str = "model") -> None:
        """Write the index, if there is more than one file."""
        if len(self.heads) > 1:
            index = {
                "metadata": {"total_size": sum(size for _, _, size in self.places.values())},
                "weight_map": {name: file for name, (file, _, _) in self.places.items()},
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy config, tokenizer and processor files of a model folder, not its weights."""
    for path in sorted(source.iterdir()):
        side = path.suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken") and not path.name.endswith(
            ".index.json"
        )
        if path.is_file() and side and path.name != "twin.json":
            shutil.copyfile(path, folder / path.name)
