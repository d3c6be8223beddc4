"""Reads safetensors lazily from checked headers, byte ranges of tensors included."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from twinmerge.errors import CheckpointError
from twinmerge.files.strict_json import parse_json, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    nbytes: int
    offset: int = field(default=0, compare=False)
    """First byte of its data in `file`."""

    @property
    def numel(self) -> int:
        """Entries of the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers were read and checked; its data stays on disk until asked for."""

    path: Path
    specs: Mapping[str, TensorSpec]
    config: dict[str, Any]
    stem: str = "model"
    """What its weights' files are called: `model`, `diffusion_pytorch_model`, or the name of a single file."""

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read and check the headers of a checkpoint.

        Args:
            path: a folder with `model.safetensors`, or with `model.safetensors.index.json` and
                its shards, or with one set of safetensors files of any other name (diffusers,
                bare folders), or one `.safetensors` file.

        Returns:
            The checkpoint; `config` is the folder's `config.json`, `{}` if there is none or for
            a single file.

        Raises:
            CheckpointError: if something is missing, truncated, garbled or contradictory.
        """
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; expected a checkpoint folder or a .safetensors file")
        if path.is_file():
            return cls(path, _read_header(path), {}, path.stem)
        stem = _find_stem(path)
        single, index = path / f"{stem}.safetensors", path / f"{stem}.safetensors.index.json"
        if single.exists() and index.exists():
            raise CheckpointError(f"{path} holds both {single.name} and {index.name}; one of them is stale, remove it")
        specs = _read_shards(index) if index.exists() else _read_header(single)
        config = path / "config.json"
        return cls(path, specs, read_json(config) if config.exists() else {}, stem)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(spec.nbytes for spec in self.specs.values())

    def read(self, name: str) -> Shaped[Tensor, "..."]:
        """Read one tensor in its stored dtype.

        Raises:
            CheckpointError: if there is no such tensor, or its file can no longer be read.
        """
        spec = self._spec(name)
        return self.read_flat(name, 0, spec.numel).view(spec.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Shaped[Tensor, "..."]:
        """Read rows `start` (included) to `stop` (excluded) of one tensor, nothing else of it.

        Raises:
            CheckpointError: if there is no such tensor, it has no such rows, or its file can no
                longer be read.
        """
        shape = self._spec(name).shape
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise CheckpointError(f"{self.path}: tensor {name!r} of shape {shape} has no rows {start}:{stop}")
        row = math.prod(shape[1:])
        return self.read_flat(name, start * row, stop * row).view(stop - start, *shape[1:])

    def read_flat(self, name: str, start: int, stop: int) -> Shaped[Tensor, " entries"]:
        """Read entries `start` (included) to `stop` (excluded) of one flattened tensor, nothing else of it.

        The bytes are read, not mapped: what was read leaves memory with the result.

        Raises:
            CheckpointError: if there is no such tensor, it has no such entries, or its file can no longer be read.
        """
        spec = self._spec(name)
        if not 0 <= start <= stop <= spec.numel:
            raise CheckpointError(f"{self.path}: tensor {name!r} of {spec.numel:,} entries has none at {start}:{stop}")
        tensor = torch.empty(stop - start, dtype=spec.dtype)
        if not tensor.numel():
            return tensor
        view = tensor.view(torch.uint8).numpy().data
        at = spec.offset + start * spec.dtype.itemsize
        try:
            descriptor = os.open(spec.file, os.O_RDONLY)
            try:
                while view and (count := os.preadv(descriptor, [view], at)):
                    view, at = view[count:], at + count
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"{spec.file}: tensor {name!r} cannot be read: {error.strerror}") from error
        if view:
            raise CheckpointError(f"{spec.file}: tensor {name!r} cannot be read: the file has become shorter")
        return tensor

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same tensors under other names; those that `names` does not say keep theirs.

        Raises:
            CheckpointError: if two get one name.
        """
        specs: dict[str, TensorSpec] = {}
        for name, spec in self.specs.items():
            new = names.get(name, name)
            if new in specs:
                raise CheckpointError(
                    f"{self.path}: two tensors are called {new!r}, {name!r} is one; the other is stale"
                )
            specs[new] = replace(spec, name=new)
        return replace(self, specs=specs)

    def _spec(self, name: str) -> TensorSpec:
        if name not in self.specs:
            raise CheckpointError(f"{self.path} has no tensor {name!r} among its {len(self.specs)}")
        return self.specs[name]


def _find_stem(folder: Path) -> str:
    """`model` if there is one, else the only set of safetensors files in the folder."""
    if (folder / WEIGHTS).exists() or (folder / INDEX).exists():
        return "model"
    index, single = ".safetensors.index.json", ".safetensors"
    stems = sorted(file.name.removesuffix(index) for file in folder.glob(f"*{index}"))
    stems = stems or sorted(file.name.removesuffix(single) for file in folder.glob(f"*{single}"))
    if not stems:
        raise CheckpointError(_explain_no_weights(folder))
    if len(stems) > 1:
        raise CheckpointError(f"{folder} holds several sets of weights ({', '.join(stems[:5])}); name one file")
    return stems[0]


def _explain_no_weights(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        return (
            f"{folder} has no {WEIGHTS}, only {pickled[0]}; convert it first "
            "(save_pretrained with transformers writes safetensors)"
        )
    return f"{folder} has neither {WEIGHTS} nor {INDEX}; it holds {', '.join(names[:5]) or 'nothing'}"


def _read_shards(index: Path) -> dict[str, TensorSpec]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} must hold a 'weight_map' of tensor names to file names")
    specs: dict[str, TensorSpec] = {}
    present = {entry.name for entry in index.parent.iterdir()}
    for file in sorted({str(file) for file in weight_map.values()}):
        if file not in present:
            raise CheckpointError(f"{index} names shard {file!r}, which is not in the folder; is the copy complete?")
        shard = index.parent / file
        for name, spec in _read_header(shard).items():
            if name in specs:
                raise CheckpointError(f"tensor {name!r} is in two shards, {specs[name].file.name} and {file}")
            if weight_map.get(name) != file:
                raise CheckpointError(f"{shard} holds tensor {name!r}, which {index.name} does not place there")
            specs[name] = spec
    if missing := [name for name in weight_map if name not in specs]:
        raise CheckpointError(
            f"{index} names {len(missing)} tensors that its shards do not hold, first {missing[0]!r} "
            f"in {weight_map[missing[0]]}"
        )
    return {name: specs[name] for name in weight_map}


def _read_header(path: Path) -> dict[str, TensorSpec]:
    try:
        size = path.stat().st_size
        with path.open("rb") as opened:
            start = opened.read(23)
            if start.startswith(b"version https://git-lfs"):
                raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`")
            length = int.from_bytes(start[:8], "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(
                    f"{path} is truncated or no safetensors file: its {size} bytes end inside the header"
                )
            opened.seek(8)
            header = opened.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        entries = parse_json(header)
        _require_texts(entries.pop("__metadata__", {}))
        specs = {name: _parse_entry(name, entry, path, 8 + length) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is no safetensors file: its header cannot be understood ({error})") from error
    data = size - 8 - length
    for name, spec in specs.items():
        if (end := spec.offset - 8 - length + spec.nbytes) > data:
            raise CheckpointError(
                f"{path} is truncated: tensor {name!r} ends at byte {end} of the data, "
                f"the file holds {data}; download it again"
            )
        if spec.nbytes != (needed := size_bytes(spec.shape, spec.dtype)):
            raise CheckpointError(
                f"{path}: tensor {name!r} has {spec.nbytes} bytes, shape {spec.shape} needs {needed}; "
                "the file is damaged, download it again"
            )
    end = 8 + length
    for spec in sorted(specs.values(), key=lambda spec: (spec.offset, spec.nbytes)):
        if spec.offset < end:
            raise CheckpointError(f"{path}: the data of tensor {spec.name!r} overlaps another's; the file is damaged")
        if spec.offset > end:
            raise _unowned(path, end, spec.offset)
        end = spec.offset + spec.nbytes
    if end < size:
        raise _unowned(path, end, size)
    return specs


def _unowned(path: Path, start: int, stop: int) -> CheckpointError:
    return CheckpointError(
        f"{path} holds {stop - start:,} bytes that belong to no tensor, from byte {start}; the file is damaged, "
        "download it again"
    )


def _require_texts(metadata: Mapping[str, Any]) -> None:
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not all texts")


def _parse_entry(name: str, entry: Mapping[str, Any], path: Path, data_start: int) -> TensorSpec:
    name.encode()  # half a character, which JSON can escape, is in no text
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end - begin)):
        raise ValueError(f"{name!r} has shape {shape} from byte {begin} to {end}")
    return TensorSpec(name, shape, _dtype(entry["dtype"], path), path, end - begin, data_start + begin)


def _dtype(name: str, path: Path) -> torch.dtype:
    if name not in DTYPES:
        raise CheckpointError(f"{path}: dtype {name!r} is not supported; known are {', '.join(DTYPES)}")
    return DTYPES[name]


def size_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor's data."""
    return math.prod(shape) * dtype.itemsize
