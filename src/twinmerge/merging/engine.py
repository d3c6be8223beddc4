"""Knows a static merge: many models in, one plain model folder out, in memory that does not depend on their size."""

import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import CheckpointError, MismatchError, RecipeError
from twinmerge.files.checkpoint import Checkpoint, TensorSpec, sha256_of
from twinmerge.files.progress import Progress, silent
from twinmerge.files.staging import fingerprint_of, require_space, resumable_folder
from twinmerge.files.writer import CheckpointWriter, copy_side_files
from twinmerge.merging.executor import MEMORY_BYTES, OWN_BYTES, Executor, make_executor, one_thread
from twinmerge.merging.methods import Stats, run_prepass
from twinmerge.merging.recipe import MergeRecipe, StaticMerge, depths, layer_count, load_merge
from twinmerge.merging.rules import Chunk, task_vectors
from twinmerge.models.compatible import (
    Allow,
    compare_configs,
    compare_tensors,
    compare_vocabularies,
    plausible_bound,
    require_plausible,
    require_related,
    require_unquantised,
)
from twinmerge.models.provenance import describe_input

MANIFEST = "merge.json"
_CHUNK_ENTRIES = 1 << 17
"""Entries in work at a time: what they need stays in the cache, and Python's own time is small beside it."""
_BYTES_PER_ENTRY = 16
"""Of one model while a chunk is merged: as stored, in float32 and in float64."""


@dataclass(frozen=True)
class MergePlan:
    """A static merge whose files were found, opened and matched."""

    merge: StaticMerge
    reference: Checkpoint
    base: Checkpoint | None
    experts: Mapping[str, Checkpoint]
    specs: tuple[TensorSpec, ...]
    """What is written, in the order of the reference."""
    depths: Mapping[str, float]
    notes: tuple[str, ...]
    """Differences that were allowed, and what is unusual."""
    allow: Allow

    @property
    def read_bytes(self) -> int:
        """Bytes of all inputs' tensors."""
        inputs = {id(model): model for model in (self.reference, self.base, *self.experts.values()) if model}
        return sum(model.nbytes for model in inputs.values())

    @property
    def write_bytes(self) -> int:
        """Bytes of the result's tensors."""
        return sum(spec.numel * spec.dtype.itemsize for spec in self.specs)

    def chunk_entries(self, memory_bytes: int, sharing: int) -> int:
        """Entries of a tensor that each of the workers that share a process's memory holds at a time.

        Raises:
            RecipeError: if the memory does not suffice for the program itself.
        """
        models = len(self.experts) + 2
        free = (memory_bytes - OWN_BYTES) // (sharing * models * _BYTES_PER_ENTRY)
        if free < 1 << 12:
            needed = OWN_BYTES + (sharing * models * _BYTES_PER_ENTRY << 12)
            raise RecipeError(f"--memory must be at least {needed / 1e6:,.0f} MB here, found {memory_bytes / 1e6:,.0f}")
        return min(_CHUNK_ENTRIES, 1 << (free.bit_length() - 1))


def plan_merge(merge: StaticMerge, allow: Allow = Allow()) -> MergePlan:
    """Open and match every file of a static merge; reads headers and configs only.

    Raises:
        MismatchError: if a model does not fit the reference.
        CheckpointError: if a file cannot be read.
        RecipeError: if the recipe has no answer for a tensor.
    """
    opened: dict[Path, Checkpoint] = {}

    def open_once(path: Path) -> Checkpoint:
        if (path / "adapter_config.json").exists():
            raise MismatchError(
                f"{path} is a LoRA adapter; `twinmerge build` takes it, a static merge needs full models"
            )
        if path not in opened:
            opened[path] = Checkpoint.open(path)
            require_unquantised(opened[path])
        return opened[path]

    reference = open_once(merge.reference)
    base = open_once(merge.base) if merge.base else None
    experts = {name: open_once(path) for name, path in merge.experts.items()}
    notes: list[str] = []
    for name, expert in experts.items():
        compare_tensors(reference, name, expert)
        notes += compare_configs(reference, name, expert, allow)
        notes += compare_vocabularies(reference.path, name, expert.path, allow)
        if mixed := [
            n for n, spec in expert.specs.items() if n in reference.specs and spec.dtype != reference.specs[n].dtype
        ]:
            first = mixed[0]
            notes.append(
                f"{name!r} stores {len(mixed)} tensors in another dtype, first {first!r}: "
                f"{expert.specs[first].dtype}, {reference.specs[first].dtype} in {reference.path.name}"
            )
    layers = layer_count(reference.specs)
    if merge.layers is not None and merge.layers != layers:
        raise MismatchError(
            f"layer_range ends at {merge.layers}, the models have {layers} layers; only whole models are merged"
        )
    deep = depths(list(reference.specs))
    for name, spec in reference.specs.items():
        if spec.dtype.is_floating_point:
            merge.rule(name, deep[name], None)
    specs = tuple(
        replace(spec, dtype=merge.dtype) if merge.dtype and spec.dtype.is_floating_point else spec
        for spec in reference.specs.values()
    )
    return MergePlan(merge, reference, base, experts, specs, deep, tuple(notes), allow)


def merge_models(
    recipe: StaticMerge | Path,
    out: Path,
    *,
    allow: Allow = Allow(),
    overwrite: bool = False,
    resume: bool = False,
    memory_bytes: int = MEMORY_BYTES,
    executor: Executor | None = None,
    hash_inputs: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Merge models into one plain model folder; it appears whole or not at all.

    Args:
        recipe: what to merge, or the path of its YAML file.
        out: the model's folder.
        allow: differences between the models that are not refused.
        overwrite: replace a folder that exists.
        resume: go on with what an interrupted run left; its finished tensors are verified first.
        memory_bytes: what a process may take; each worker of `processes` and `ray` is one.
        executor: where tensors are merged; None takes a thread for every core. The result has the same bits.
        hash_inputs: hash every byte of the inputs for the manifest, another pass over them; else their headers.
        progress: told after every tensor.

    Returns:
        The manifest.

    Raises:
        InputError: whatever is wrong with the recipe or the models, in one line; nothing is written.
    """
    merge = recipe if isinstance(recipe, StaticMerge) else load_merge(Path(recipe))
    plan = plan_merge(merge, allow)
    executor = executor or make_executor("threads")
    entries = plan.chunk_entries(memory_bytes, executor.sharing)
    with one_thread():
        _require_all_related(plan)
    with resumable_folder(out, _fingerprint(plan), overwrite=overwrite, resume=resume) as staged:
        writer = CheckpointWriter.plan(plan.specs, staged.folder, plan.reference.stem)
        require_space(staged.folder, writer.nbytes)
        writer.allocate()
        finished = {name: digest for name, digest in staged.finished.items() if _is_intact(writer, name, digest)}
        with one_thread():
            stats = _whole_model_stats(plan, entries)
        largest_first = sorted((s for s in plan.specs if s.name not in finished), key=lambda spec: -spec.numel)
        task = _Task(plan, writer, stats, entries)
        progress("merging", len(finished), len(plan.specs))
        for spec, digest in executor.map(task, largest_first):
            finished[spec.name] = digest
            staged.record(spec.name, digest)
            progress("merging", len(finished), len(plan.specs))
        writer.finish(plan.reference.stem)
        _copy_side_files(plan, staged.folder)
        manifest = _manifest(plan, writer, hash_inputs)
        (staged.folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


@dataclass(frozen=True)
class _Task:
    """Merges one tensor: reads it in chunks, writes each to its place; run twice it writes the same bytes."""

    plan: MergePlan
    writer: CheckpointWriter
    stats: Stats | None
    entries: int

    def __call__(self, spec: TensorSpec) -> str:
        """The SHA-256 of what was written."""
        digest = hashlib.sha256()
        if not spec.dtype.is_floating_point:
            for start, stop in _stretches(spec.numel, self.entries):
                digest.update(self.writer.write(spec.name, start, _copied(self.plan, spec.name, start, stop)))
            return digest.hexdigest()
        rule = self.plan.merge.rule(spec.name, self.plan.depths[spec.name], self.stats)
        entries = max(spec.numel, 1) if rule.whole else self.entries
        measured = rule.measure(lambda: read_chunks(self.plan, spec.name, entries))
        for chunk in read_chunks(self.plan, spec.name, entries, whole=rule.whole):
            merged = rule.merge(chunk, measured)
            rounded = merged.to(spec.dtype).reshape(-1)
            if not _is_finite(rounded):
                raise CheckpointError(
                    f"{spec.name!r}: the merged values go up to {float(merged.abs().max()):.3g}, more than "
                    f"{spec.dtype} holds; choose another dtype or smaller weights"
                )
            digest.update(self.writer.write(spec.name, chunk.at, rounded))
        return digest.hexdigest()


def read_chunks(plan: MergePlan, name: str, entries: int, *, whole: bool = False) -> Iterator[Chunk]:
    """Go through one tensor of all models, refusing values that no fine-tune has.

    Raises:
        CheckpointError: naming file and tensor of NaN, Inf or values out of all proportion.
    """
    spec = plan.reference.specs[name]
    for start, stop in _stretches(spec.numel, entries):
        reference = plan.base or plan.reference
        first = reference.read_flat(name, start, stop)
        whose = "base" if plan.base else "reference"
        largest = require_plausible(first, f"{whose}: {name!r} in {reference.specs[name].file}", start)
        bound = None if plan.allow.unrelated else plausible_bound(largest)
        experts = {}
        for expert, checkpoint in plan.experts.items():
            tensor = first if checkpoint is reference else checkpoint.read_flat(name, start, stop)
            if checkpoint is not reference:
                require_plausible(tensor, f"expert {expert!r}: {name!r} in {checkpoint.specs[name].file}", start, bound)
            experts[expert] = tensor.view(spec.shape) if whole else tensor
        base = (first.view(spec.shape) if whole else first) if plan.base else None
        yield Chunk(name, start, base, experts)


def _stretches(numel: int, entries: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + entries, numel)) for start in range(0, numel, entries))


def _is_finite(tensor: Tensor) -> bool:
    low, high = torch.aminmax(tensor if tensor.dtype.itemsize > 1 else tensor.float())
    return bool(low.isfinite() and high.isfinite())


def _copied(plan: MergePlan, name: str, start: int, stop: int) -> Tensor:
    """Integers are not merged: the reference's are taken, and all models must agree on them."""
    ours = plan.reference.read_flat(name, start, stop)
    for expert, checkpoint in plan.experts.items():
        if name in checkpoint.specs and not torch.equal(checkpoint.read_flat(name, start, stop), ours):
            raise MismatchError(
                f"expert {expert!r}: the integers of {name!r} in {checkpoint.specs[name].file} are not the base's"
            )
    return ours


def _require_all_related(plan: MergePlan) -> None:
    if plan.allow.unrelated:
        return
    names = [n for n, spec in plan.reference.specs.items() if len(spec.shape) > 1 and spec.dtype.is_floating_point]
    for name, expert in plan.experts.items():
        if expert is not plan.reference:
            require_related(plan.reference, name, expert, [(n, n) for n in names], ", or --allow-unrelated")


def _whole_model_stats(plan: MergePlan, entries: int) -> Stats | None:
    """What the method's pass over the whole model finds."""
    if not isinstance(plan.merge.recipe, MergeRecipe):
        return None

    return run_prepass(plan.merge.recipe.shared, partial(_all_task_vectors, plan, entries))


def _all_task_vectors(plan: MergePlan, entries: int) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Stretch by stretch of every tensor that is merged: its name, and the task vectors by expert."""
    for spec in [spec for spec in plan.specs if spec.dtype.is_floating_point]:
        yield from task_vectors(partial(read_chunks, plan, spec.name, entries))


def _is_intact(writer: CheckpointWriter, name: str, digest: str) -> bool:
    file, offset, size = writer.places[name]
    found = hashlib.sha256()
    with (writer.folder / file).open("rb") as opened:
        opened.seek(offset)
        while size and (part := opened.read(min(size, 1 << 24))):
            found.update(part)
            size -= len(part)
    return found.hexdigest() == digest


def _fingerprint(plan: MergePlan) -> str:
    """What an interrupted run must have had in common with this one to be gone on with."""
    files = [spec.file for model in (plan.reference, *plan.experts.values()) for spec in model.specs.values()]
    recipe = (
        plan.merge.recipe.model_dump_json(warnings=False)
        if isinstance(plan.merge.recipe, MergeRecipe)
        else repr(plan.merge.recipe)
    )
    return fingerprint_of([importlib.metadata.version("twinmerge"), recipe, plan.merge.seed], files)


def _copy_side_files(plan: MergePlan, folder: Path) -> None:
    """Config, tokenizer and processor files of the reference; the config says the dtype of the result."""
    if not plan.reference.path.is_dir():
        return
    copy_side_files(plan.reference.path, folder)
    config = folder / "config.json"
    if plan.merge.dtype and config.exists():
        content = json.loads(config.read_text(encoding="utf-8"))
        for key in ("dtype", "torch_dtype"):
            if key in content:
                content[key] = str(plan.merge.dtype).removeprefix("torch.")
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _manifest(plan: MergePlan, writer: CheckpointWriter, hash_inputs: bool) -> dict[str, Any]:
    inputs = {str(model.path): model for model in (plan.reference, *plan.experts.values())}
    files = {
        file: {"bytes": size, "sha256": sha256_of(writer.folder / file)} for file, (_, size) in writer.heads.items()
    }
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: importlib.metadata.version(name) for name in ("twinmerge", "torch")},
        "recipe": plan.merge.record(),
        "inputs": [describe_input(model, whole=hash_inputs) for model in inputs.values()],
        "tensors": len(plan.specs),
        "files": files,
        "notes": list(plan.notes),
    }
