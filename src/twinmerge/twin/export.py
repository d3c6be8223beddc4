"""Writes a twin's exclusive knowledge as other tools read it: a PEFT adapter per expert, or one stacked adapter."""

import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import ArtifactError
from twinmerge.files.writer import save_tensors
from twinmerge.models.provenance import portable
from twinmerge.tensors.low_rank import LowRank
from twinmerge.tensors.parts import Dense, Part, of_form
from twinmerge.twin.artifact import IN_ADAPTER, PEFT_PREFIX, TwinArtifact, adapter_config, to_peft, write_exclusive
from twinmerge.twin.plan import MATRICES

STACKED = "stacked.json"


def export_peft(artifact: TwinArtifact, out: Path, place: Path) -> dict[str, Any]:
    """Write one PEFT adapter per expert, which on the shared expert is that expert's backbone.

    Matrices become LoRA pairs of scale 1, biases of layers with a pair its `lora_bias`, norms `modules_to_save`.
    What no adapter carries lies beside it in `exclusive.safetensors`, the head in `head/`.

    Args:
        artifact: the twin.
        out: an existing folder; gets a folder for every expert.
        place: where it will lie, from which the twin is seen.

    Returns:
        By expert, how many `pairs`, `biases` and `norms` the adapter holds, and the parameters left `beside` it.

    Raises:
        ArtifactError: if the twin keeps entries instead of factors.
    """
    _require_factors(artifact)
    return {
        expert: _export_expert(artifact, expert, out / expert, portable(place / expert, artifact.path.resolve()))
        for expert in artifact.expert_names
    }


def export_stacked(artifact: TwinArtifact, out: Path, place: Path) -> dict[str, Any]:
    """Write one PEFT adapter of all experts: downs stacked on the rank axis, ups side by side.

    As it is, it adds every expert with weight 1; a gate is a factor on each expert's columns of `lora_B`, which
    `stacked.json` names. 1-D parts, which no pair holds, are rows of `vectors.safetensors` in the experts' order.

    Args:
        artifact: the twin.
        out: an existing folder.
        place: where it will lie, from which the twin is seen.

    Returns:
        What stacked.json says: `experts` in order, `columns` by module and expert (first, after last), `vectors`.

    Raises:
        ArtifactError: if the twin keeps entries instead of factors.
    """
    _require_factors(artifact)
    kinds, specs = artifact.kinds, artifact.shared.specs
    parts = {expert: artifact.exclusive(expert) for expert in artifact.expert_names}
    pairs: dict[str, Part] = {}
    vectors: dict[str, Tensor] = {}
    columns: dict[str, dict[str, tuple[int, int]]] = {}
    for name in sorted({name for found in parts.values() for name in found}):
        held = {expert: found[name] for expert, found in parts.items() if name in found}
        if factors := of_form(held, LowRank):
            pairs[name] = LowRank(
                torch.cat([part.up for part in factors.values()], dim=1),
                torch.cat([part.down for part in factors.values()]),
            )
            columns[name.removesuffix(".weight")] = _columns(factors)
            continue
        zeros = torch.zeros(specs[name].shape, dtype=specs[name].dtype)
        vectors[name] = torch.stack([held[e].dense() if e in held else zeros for e in parts])
    write_exclusive(out, pairs, kinds, {name: spec.shape for name, spec in specs.items()})
    config = out / "adapter_config.json"
    if config.exists():
        settings = json.loads(config.read_text(encoding="utf-8"))
        _write_json(config, settings | {"base_model_name_or_path": portable(place, artifact.path.resolve())})
    if vectors:
        save_tensors(vectors, out / "vectors.safetensors")
    content = {"experts": list(parts), "columns": columns, "vectors": sorted(vectors)}
    _write_json(out / STACKED, content)
    return content


def _columns(factors: Mapping[str, LowRank]) -> dict[str, tuple[int, int]]:
    """Which columns of the stacked pair are whose."""
    found, start = {}, 0
    for expert, part in factors.items():
        found[expert] = (start, start + part.rank)
        start += part.rank
    return found


def _require_factors(artifact: TwinArtifact) -> None:
    compression = artifact.manifest.recipe.exclusive.compression
    if compression != "svd":
        raise ArtifactError(
            f"{artifact.path} keeps single entries (compression: {compression}), which no LoRA adapter holds; "
            "export it as dense"
        )


def _export_expert(artifact: TwinArtifact, expert: str, folder: Path, base: str) -> dict[str, Any]:
    """One expert's adapter folder; `base` is the twin as it will be seen from there."""
    kinds, specs = artifact.kinds, artifact.shared.specs
    parts = artifact.exclusive(expert)
    pairs = {n: p for n, p in of_form(parts, LowRank).items() if kinds[n] in IN_ADAPTER}
    dense = {n: p.values for n, p in of_form(parts, Dense).items() if kinds[n] == "vector"}
    biases = {n: p for n, p in dense.items() if kinds.get(_weight_of(n), "vector") in MATRICES}
    norms = sorted({n.rpartition(".")[0] for n in dense if n not in biases})
    adapted = set(pairs) | {w for n in biases if kinds[w := _weight_of(n)] in IN_ADAPTER}
    carried = all(kinds[n] != "embedding" and _bias_of(n) in specs for n in adapted)
    on_pairs = {n: p for n, p in biases.items() if carried and _weight_of(n) in adapted}
    for name in [n for n in kinds if kinds[n] in IN_ADAPTER and n.endswith(".weight")]:
        if name not in pairs and (_bias_of(name) in on_pairs or not adapted):
            pairs[name] = _nothing(specs[name].shape, specs[name].dtype)  # PEFT knows no bias, and no adapter, alone
            adapted.add(name)
    beside = {
        n: p for n, p in parts.items() if n not in pairs and n not in on_pairs and n.rpartition(".")[0] not in norms
    }
    write_exclusive(folder, beside, kinds, {})
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        tensors |= to_peft(name, pair, kinds[name], specs[name].shape)
        if on_pairs:
            bias = on_pairs.get(_bias_of(name), torch.zeros(specs[_bias_of(name)].shape, dtype=specs[name].dtype))
            tensors[f"{PEFT_PREFIX}{name.removesuffix('.weight')}.lora_B.bias"] = bias
    for name in _saved_with(norms, specs):
        shared = artifact.shared.read(name)
        whole = shared.double() + dense[name].double() if name in dense else shared
        tensors[PEFT_PREFIX + name] = whole.to(shared.dtype)
    config = adapter_config(pairs, kinds, base=base)
    save_tensors(tensors, folder / "adapter_model.safetensors")
    _write_json(
        folder / "adapter_config.json", config | {"lora_bias": bool(on_pairs), "modules_to_save": norms or None}
    )
    if (head := artifact.path / "experts" / expert / "head").is_dir():
        shutil.copytree(head, folder / "head")
    return {"pairs": len(pairs), "biases": len(on_pairs), "norms": len(norms), "beside": sorted(beside)}


def _saved_with(modules: Collection[str], names: Iterable[str]) -> list[str]:
    """Tensors that PEFT asks for when it saves modules: of every module whose name ends as one of theirs."""
    endings = tuple(modules)
    return [name for name in names if any(name[:end].endswith(endings) for end, c in enumerate(name) if c == ".")]


def _weight_of(bias: str) -> str:
    return f"{bias.rpartition('.')[0]}.weight"


def _bias_of(weight: str) -> str:
    return f"{weight.rpartition('.')[0]}.bias"


def _nothing(shape: tuple[int, ...], dtype: torch.dtype) -> LowRank:
    """A pair that adds nothing."""
    return LowRank(torch.zeros(shape[0], 1, dtype=dtype), torch.zeros(1, torch.Size(shape[1:]).numel(), dtype=dtype))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
