"""Reads and writes a twin's folder: its layout, its manifest, and exclusive parts as PEFT adapters."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import ArtifactError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.hashes import sha256_of
from twinmerge.files.writer import save_tensors
from twinmerge.tensors.float8 import EIGHT_BITS, SCALE
from twinmerge.tensors.low_rank import LowRank
from twinmerge.tensors.parts import STORED_ONLY, Part, unpack
from twinmerge.twin.manifest import MANIFEST, Manifest, files_in, read_manifest
from twinmerge.twin.plan import TRANSPOSED, Kind

PEFT_PREFIX = "base_model.model."
MODULE = "module.json"
"""Where a twin of a plain torch module says how it is called."""
IN_ADAPTER: tuple[Kind, ...] = ("linear", "conv1d", "conv", "embedding")


@dataclass(frozen=True)
class TwinArtifact:
    """A twin on disk: shared expert, exclusive parts, heads, router and manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str) -> "TwinArtifact":
        """Open a twin's folder and check its version and the sizes of its files.

        Raises:
            ArtifactError: if it is no twin, of another format version, or a file is missing or of another size.
        """
        path = Path(path)
        manifest = read_manifest(path)
        artifact = cls(path, manifest)
        for name, entry in manifest.files.items():
            found = f"{(path / name).stat().st_size:,}" if (path / name).is_file() else "no file"
            if found != f"{entry.bytes:,}":
                raise ArtifactError(
                    f"{path / name} must hold {entry.bytes:,} bytes, found {found}; copy or build the twin again"
                )
        return artifact

    def require_model(self) -> "TwinArtifact":
        """Itself, if it is of a transformers model.

        Raises:
            ArtifactError: if it is of a plain torch module, which no file says how to make.
        """
        if (self.path / MODULE).is_file():
            raise ArtifactError(
                f"{self.path} is a twin of a plain torch module, of which a folder holds the weights alone: in "
                "Python, twinmerge.wrap(module, folder) answers and its state_for(gate) gives plain weights"
            )
        return self

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The gate's columns, in order."""
        return tuple(self.manifest.experts)

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """Parameter name -> what its layer is."""
        return {name: entry.kind for name, entry in self.manifest.tensors.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Of most of the shared expert's numbers."""
        counts: Counter[torch.dtype] = Counter()
        for spec in self.shared.specs.values():
            counts[spec.dtype] += spec.numel if spec.dtype.is_floating_point else 0
        return counts.most_common(1)[0][0]

    @cached_property
    def shared(self) -> Checkpoint:
        """The shared expert's weights."""
        return Checkpoint.open(self.path)

    def exclusive(self, expert: str) -> dict[str, Part]:
        """One expert's exclusive knowledge, by parameter name; parameters that are not there have none.

        Pairs of 8 and 4 bits, which are for the disk only, come in the dtype of their parameter.
        """
        folder, specs = self.path / "experts" / expert, self.shared.specs
        parts: dict[str, Part] = {}
        if (folder / "adapter_model.safetensors").exists():
            parts |= _read_adapter(Checkpoint.open(folder / "adapter_model.safetensors"), self.kinds)
        if (folder / "exclusive.safetensors").exists():
            parts |= _read_exclusive(Checkpoint.open(folder / "exclusive.safetensors"), self.shared)
        return {n: part.to(specs[n].dtype) if isinstance(part, STORED_ONLY) else part for n, part in parts.items()}

    def head(self, expert: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """An expert's config and head tensors, None if experts share the base's output layer."""
        folder = self.path / "experts" / expert / "head"
        if not folder.exists():
            return None
        checkpoint = Checkpoint.open(folder)
        return dict(checkpoint.config), {name: checkpoint.read(name) for name in checkpoint.specs}

    def bytes_per_part(self) -> dict[str, int]:
        """Bytes on disk of `shared`, `exclusive`, `heads`, `router` and `other` files; they sum to the folder's."""
        parts = dict.fromkeys(("shared", "exclusive", "heads", "router", "other"), 0)
        for name, entry in self.manifest.files.items():
            parts[_part_of(name)] += entry.bytes
        parts["other"] += (self.path / MANIFEST).stat().st_size
        return parts

    def bytes_per_expert(self) -> dict[str, dict[str, int]]:
        """Bytes on disk of every expert's `exclusive` and `heads`; they sum to the parts of `bytes_per_part`."""
        experts = {name: {"exclusive": 0, "heads": 0} for name in self.expert_names}
        for name, entry in self.manifest.files.items():
            if name.startswith("experts/"):
                experts[name.split("/")[1]][_part_of(name)] += entry.bytes
        return experts

    def verify(self) -> int:
        """Check the hash of every file.

        Returns:
            The number of files.

        Raises:
            ArtifactError: naming the first file whose content changed, or a file the manifest does not know.
        """
        known = self.manifest.files
        for name, entry in known.items():
            found = sha256_of(self.path / name)
            if found != entry.sha256:
                raise ArtifactError(
                    f"{self.path / name} changed: sha256 must be {entry.sha256[:16]}…, found {found[:16]}…"
                )
        extra = sorted(files_in(self.path) - set(known) - {MANIFEST})
        if extra:
            raise ArtifactError(f"{self.path / extra[0]} is not part of the twin; remove it")
        return len(known)


def _part_of(name: str) -> str:
    if name.startswith("experts/"):
        return "heads" if name.split("/")[2] in ("head", "own") else "exclusive"
    if name.startswith("router/"):
        return "router"
    return "shared" if name.endswith((".safetensors", ".safetensors.index.json")) else "other"


def write_exclusive(
    folder: Path, parts: Mapping[str, Part], kinds: Mapping[str, Kind], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Write one expert's exclusive knowledge: a PEFT adapter, and beside it what PEFT cannot carry.

    Args:
        folder: `experts/NAME`, created if it is not there.
        parts: parameter name -> exclusive knowledge; empty ones are left out; pairs of 8 bits are all or none.
        kinds: parameter name -> what its layer is.
        shapes: parameter name -> its shape in the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    in_adapter: dict[str, LowRank] = {}
    beside: dict[str, Tensor] = {}
    for name, part in sorted(parts.items()):
        if isinstance(part, LowRank) and kinds[name] in IN_ADAPTER and name.endswith(".weight"):
            in_adapter |= {name: part} if part.rank else {}
        elif part.nbytes:
            beside |= {name if leaf == "dense" else f"{name}.{leaf}": tensor for leaf, tensor in part.pack().items()}
    tensors: dict[str, Tensor] = {}
    for name, part in in_adapter.items():
        tensors.update(to_peft(name, part, kinds[name], shapes[name]))
    if in_adapter:
        save_tensors(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(
            json.dumps(adapter_config(in_adapter, kinds), indent=1) + "\n", encoding="utf-8"
        )
    if beside:
        save_tensors(beside, folder / "exclusive.safetensors")


def to_peft(name: str, part: LowRank, kind: Kind, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The tensors of an adapter that make one pair, by PEFT's names.

    PEFT multiplies `B A`; embeddings and Conv1D are stored transposed, so their factors swap sides.
    """
    module = PEFT_PREFIX + name.removesuffix(".weight")
    up, down = part.up, part.down
    if kind == "embedding":
        return {f"{module}.lora_embedding_A": up.T.contiguous(), f"{module}.lora_embedding_B": down.T.contiguous()}
    if kind in TRANSPOSED:
        return {f"{module}.lora_A.weight": up.T.contiguous(), f"{module}.lora_B.weight": down.T.contiguous()}
    if kind == "conv":
        up, down = up.reshape(*up.shape, *(1,) * (len(shape) - 2)), down.reshape(part.rank, *shape[1:])
    return {f"{module}.lora_A.weight": down.contiguous(), f"{module}.lora_B.weight": up.contiguous()}


def adapter_config(parts: Mapping[str, LowRank], kinds: Mapping[str, Kind], base: str = "../..") -> dict[str, Any]:
    """A LoraConfig whose every pair has scale 1 (alpha = rank), or that of 8 bits; ranks differ by module.

    Args:
        parts: parameter name -> pair, of rank 1 at least.
        kinds: parameter name -> what its layer is.
        base: where the model that it adapts is; the twin's folder, seen from `experts/NAME`.
    """
    ranks = {name.removesuffix(".weight"): part.rank for name, part in parts.items()}
    common = max(ranks.values())
    pattern = {module.replace(".", r"\."): rank for module, rank in ranks.items() if rank != common}
    scale = SCALE if any(part.up.dtype == EIGHT_BITS for part in parts.values()) else 1
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": common,
        "lora_alpha": scale * common,
        "rank_pattern": pattern,
        "alpha_pattern": {module: scale * rank for module, rank in pattern.items()},
        "target_modules": sorted(ranks),
        "fan_in_fan_out": any(kinds[name] == "conv1d" for name in parts),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "task_type": None,
    }


def _read_adapter(checkpoint: Checkpoint, kinds: Mapping[str, Kind]) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for stored in checkpoint.specs:
        module, _, leaf = stored.removeprefix(PEFT_PREFIX).partition(".lora_")
        if not leaf.startswith(("A", "embedding_A")):
            continue
        name = f"{module}.weight"
        other = stored.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        a, b = checkpoint.read(stored).flatten(1), checkpoint.read(other).flatten(1)
        up, down = (a.T.contiguous(), b.T.contiguous()) if kinds[name] in TRANSPOSED else (b, a)
        parts[name] = unpack({"up": up, "down": down}, (len(up), down.shape[1]))
    return parts


def _read_exclusive(checkpoint: Checkpoint, shared: Checkpoint) -> dict[str, Part]:
    leaves: dict[str, dict[str, Tensor]] = {}
    for stored in checkpoint.specs:
        name, leaf = (stored, "dense") if stored in shared.specs else tuple(stored.rsplit(".", 1))
        leaves.setdefault(name, {})[leaf] = checkpoint.read(stored)
    shapes = {name: shared.specs[name].shape for name in leaves}
    return {n: unpack(found, (math.prod(shapes[n][:1]), math.prod(shapes[n][1:]))) for n, found in leaves.items()}
