"""Safetensors on disk: read lazily from checked headers, written in place, durable before they are visible."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from twinmerge.errors import CheckpointError, OutputExistsError
from twinmerge.files.lock import fsync

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES: Mapping[str, torch.dtype] = {
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
_DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in _DTYPES.items()}


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
            CheckpointError: if there is no such tensor or its file can no longer be read.
        """
        spec = self._spec(name)
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


def save_tensors(
    tensors: Mapping[str, Shaped[Tensor, "..."]], path: Path, metadata: dict[str, str] | None = None
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
    _write_file(path, layout, tensors.__getitem__, metadata or {})


def save_checkpoint(
    specs: Iterable[TensorSpec], read: Callable[[str], Tensor], folder: Path, max_shard_bytes: int
) -> None:
    """Write a checkpoint as transformers does, with one tensor in memory at a time.

    The shards are planned from `specs` before the first tensor is read; each file is laid out
    under its final header and filled in place. An index is written if there is more than one.

    Args:
        specs: names, shapes and dtypes in the order to write (`file` and `nbytes` are not used).
        read: gives the tensor of a name, called once for each.
        folder: an existing folder without weights.
        max_shard_bytes: bytes of tensors per file; a larger tensor gets a file of its own.

    Raises:
        OutputExistsError: if `folder` holds weights already (an older index would be read first).
        CheckpointError: if a dtype has no name in the safetensors format.
        ValueError: if `read` gives a tensor of another shape or dtype than announced.
    """
    if found := sorted(file.name for file in folder.glob("model*.safetensors*")):
        raise OutputExistsError(f"{folder} holds weights already ({found[0]}); write to an empty folder")
    layout = {spec.name: (spec.shape, spec.dtype) for spec in specs}
    shards = plan_shards({name: _size_bytes(*entry) for name, entry in layout.items()}, max_shard_bytes)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [WEIGHTS]
    for file, names in zip(files, shards, strict=True):
        _write_file(folder / file, {name: layout[name] for name in names}, read, {})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(_size_bytes(*entry) for entry in layout.values())},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        fsync(folder / INDEX)
        fsync(folder)


def lay_out(
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
        begin, end = end, end + _size_bytes(shape, dtype)
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    data = 8 + len(encoded)
    offsets = {name: data + header[name]["data_offsets"][0] for name in layout}
    return len(encoded).to_bytes(8, "little") + encoded, offsets, data + end


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal, read in chunks."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        CheckpointError: if it holds none, or one with a key twice.
    """
    try:
        content = _parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def _parse_json(raw: bytes) -> Any:
    """As `json.loads`, but everything wrong is a ValueError, a key that stands twice too."""
    try:
        return json.loads(raw, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


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
        entries = _parse_json(header)
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
        if spec.nbytes != (needed := _size_bytes(spec.shape, spec.dtype)):
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
    if name not in _DTYPES:
        raise CheckpointError(f"{path}: dtype {name!r} is not supported; known are {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _size_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
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


def _write_file(
    path: Path,
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    head, offsets, size = lay_out(layout, metadata)
    staging = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with staging.open("wb") as opened:
            opened.write(head)
            opened.truncate(size)
            for name, (shape, dtype) in layout.items():
                tensor = read(name)
                if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
                    raise ValueError(f"{name!r}: announced {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}")
                opened.seek(offsets[name])
                opened.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            opened.flush()
            os.fsync(opened.fileno())
        staging.replace(path)
        fsync(path.parent)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
