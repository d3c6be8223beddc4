"""Writes a twin for other tools: a plain model for one gate, PEFT adapters, one stacked adapter."""

import datetime
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from twinmerge.errors import ArtifactError, GateError
from twinmerge.files.progress import Progress, silent
from twinmerge.files.target import durable_folder
from twinmerge.files.writer import copy_side_files
from twinmerge.hf.loading import quiet
from twinmerge.hf.model import TwinModel
from twinmerge.hf.own import GENERATION, OWN, bring_own, load_generation
from twinmerge.jobs.build import versions
from twinmerge.models.provenance import portable
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.twin.export import export_peft, export_stacked

Form = Literal["dense", "peft", "stacked-lora"]
NOTE = "export.json"


def export(
    twin: Path | str,
    out: Path | str,
    *,
    to: Form,
    gate: Mapping[str, float] | None = None,
    expert: str | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a twin in a form that other tools load; the folder appears whole or not at all.

    Args:
        twin: the twin's folder.
        out: the folder to write.
        to: `dense`, an ordinary transformers model for one gate, with the head, tokenizer and settings of its
            largest weight; `peft`, a PEFT adapter for every expert, with its own beside it; `stacked-lora`, one
            adapter of all of them with its map.
        gate: for `dense`, weights by expert; those left out are 0, and nothing makes them sum to 1.
        expert: for `dense`, this expert alone: the same as a gate of 1 for it.
        overwrite: replace a folder that exists.
        progress: called with (stage, done, total).

    Returns:
        What export.json in the folder says: where it came from, its form, licences, and what it holds.

    Raises:
        GateError: if `dense` has no gate or other than one, or another form has any; if an expert is unknown.
        ArtifactError: if the twin keeps entries, or tokens of an expert's own, which no adapter holds.
    """
    artifact = TwinArtifact.open(twin).require_model()
    weights = _gate(artifact, to, gate, expert)
    with durable_folder(Path(out), {"to": to}, overwrite=overwrite) as target:
        folder = target.folder
        if to == "dense":
            held = _export_dense(artifact, folder, weights)
        else:
            held = (export_peft if to == "peft" else export_stacked)(artifact, folder, Path(out))
            for name in artifact.expert_names if to == "peft" else ():
                bring_own(artifact.path / "experts" / name / OWN, folder / name)
        progress(f"exporting as {to}", 1, 1)
        note = {
            "twin": portable(Path(out), artifact.path.resolve()),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "to": to,
            "licences": {name: entry.licence for name, entry in artifact.manifest.inputs.items()},
            "holds": held,
        }
        (folder / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    return note


def _gate(artifact: TwinArtifact, to: Form, gate: Mapping[str, float] | None, expert: str | None) -> dict[str, float]:
    """A weight for every expert; none for the forms that hold all of them."""
    if to != "dense":
        if gate is not None or expert is not None:
            raise GateError(f"{to} holds every expert and takes no gate; only dense is made for one")
        if (vocabulary := artifact.manifest.vocabulary) is not None:
            raise ArtifactError(
                f"expert {min(vocabulary.added)!r} has tokens of its own, which no adapter on the shared expert reads "
                f"by the ids of its tokenizer; export it as dense, not as {to}"
            )
        return {}
    if (gate is None) == (expert is None):
        raise GateError("dense is a model for one gate; give weights by expert (--gate) or one expert (--expert)")
    found = {expert: 1.0} if expert is not None else dict(gate or {})
    unknown = sorted(str(name) for name in found if name not in artifact.expert_names)
    if unknown:
        raise GateError(f"unknown expert {unknown[0]!r}; this twin has {', '.join(artifact.expert_names)}")
    if not any(found.values()):
        raise GateError("a gate of zeros is the shared expert, which the twin's own folder loads as")
    return {name: float(found.get(name, 0.0)) for name in artifact.expert_names}


def _export_dense(artifact: TwinArtifact, folder: Path, gate: Mapping[str, float]) -> dict[str, Any]:
    """A plain model folder: weights summed for the gate, and all else of the expert with the largest weight."""
    model = TwinModel.from_pretrained(artifact.path, dtype=artifact.dtype)
    plain: Any = model.materialize(torch.tensor(list(gate.values()), dtype=torch.float64))
    chosen = max(gate, key=gate.__getitem__)
    own = artifact.path / "experts" / chosen / OWN
    settings = load_generation(own) if (own / GENERATION).is_file() else None
    for token in ("bos_token_id", "eos_token_id", "pad_token_id") if settings is not None else ():
        setattr(plain.config, token, getattr(settings, token))
    copy_side_files(artifact.path, folder)
    with quiet():
        plain.save_pretrained(folder)
    if (artifact.path / GENERATION).is_file():
        shutil.copyfile(artifact.path / GENERATION, folder / GENERATION)
    bring_own(own, folder)
    return {"gate": dict(gate), "head": chosen if model.heads else None, "class": type(plain).__name__, "own": chosen}
