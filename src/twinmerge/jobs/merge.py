"""Merges many models into one plain model folder, in memory that does not depend on their size."""

import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import MismatchError
from twinmerge.files.checkpoint import Checkpoint, TensorSpec
from twinmerge.files.hashes import fingerprint_of, sha256_of, sha256_of_json
from twinmerge.files.progress import Progress, silent
from twinmerge.files.strict_json import read_json
from twinmerge.files.target import Folder, durable_folder, require_space, size_of
from twinmerge.files.writer import CheckpointWriter, copy_side_files
from twinmerge.merging.engine import merge_tensor
from twinmerge.merging.executor import MEMORY_BYTES, Executor, make_executor, one_thread
from twinmerge.merging.method import Calibrated, Chunk
from twinmerge.merging.plan import MergePlan, plan_merge, stretches
from twinmerge.merging.recipe import StaticMerge, load_merge
from twinmerge.merging.statistics import Statistics
from twinmerge.merging.tokenizer import write_tokenizer
from twinmerge.models.compatible import Allow
from twinmerge.models.provenance import describe_input

MANIFEST = "merge.json"
_COUNTER = "num_batches_tracked"
"""How the names of integers end that count training steps: they differ by nature."""


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
        plan.require_related()
    calibration = None
    if issubclass(plan.merge.methods.form, Calibrated):
        from twinmerge.jobs.measure import for_merge  # and with it the model library, which other merges do without

        calibration = for_merge(plan)
    with durable_folder(out, fingerprint(plan), overwrite=overwrite, resume=resume) as target:
        if not target.complete:
            measured = calibration.measure(target, progress) if calibration else {}
            _merge_into(target, plan, measured, entries, executor, progress)
            manifest = json.dumps(_manifest(plan, target.folder, hash_inputs), indent=1)
            (target.folder / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
    return read_json(out / MANIFEST)


def _merge_into(
    target: Folder,
    plan: MergePlan,
    measured: Mapping[str, Checkpoint],
    entries: int,
    executor: Executor,
    progress: Progress,
) -> None:
    """Merge what the folder in work does not hold yet."""
    writer = CheckpointWriter.plan(plan.specs, target.folder, plan.reference.stem)
    require_space(target.folder, writer.nbytes - size_of(target.folder))
    writer.allocate()
    finished = {name: digest for name, digest in target.finished.items() if name in writer.places}
    done = {name for name, digest in finished.items() if _is_intact(writer, name, digest)}
    with one_thread():
        statistics = _prepasses(plan, measured, entries)
    largest_first = sorted((spec for spec in plan.specs if spec.name not in done), key=lambda spec: -spec.numel)
    progress("merging", len(done), len(plan.specs))
    results = executor.map(_Task(plan, writer, statistics, entries), largest_first)
    for count, (spec, digest) in enumerate(results, len(done) + 1):
        target.record(spec.name, digest)
        progress("merging", count, len(plan.specs))
    writer.finish()
    _copy_side_files(plan, target.folder)
    write_tokenizer(plan.merge.tokenizer, [model.path for model in plan.inputs], target.folder)


@dataclass(frozen=True)
class _Task:
    """Merges one tensor: reads it in chunks, writes each to its place; run twice it writes the same bytes."""

    plan: MergePlan
    writer: CheckpointWriter
    statistics: Mapping[str, Statistics]
    """By the method's settings."""
    entries: int

    def __call__(self, spec: TensorSpec) -> str:
        """The SHA-256 of what was written."""
        digest = hashlib.sha256()
        for start, values in self._merged(spec) if spec.dtype.is_floating_point else self._copied(spec):
            digest.update(self.writer.write(spec.name, start, values))
        return digest.hexdigest()

    def _merged(self, spec: TensorSpec) -> Iterator[tuple[int, Tensor]]:
        method = self.plan.method(spec.name)
        read = partial(self.plan.chunks, spec.name, self.entries)
        statistics = self.statistics.get(method.model_dump_json(), Statistics())
        return merge_tensor(method, read, statistics, spec.dtype, whole=method.takes_whole(spec.name, spec.shape))

    def _copied(self, spec: TensorSpec) -> Iterator[tuple[int, Tensor]]:
        """Integers are not merged: the reference's are taken, and all models must agree on them, except on counters."""
        for start, stop in stretches(spec.numel, self.entries):
            ours = self.plan.reference.read_flat(spec.name, start, stop)
            for expert, checkpoint in self.plan.experts.items():
                known = spec.name in checkpoint.specs and not spec.name.endswith(_COUNTER)
                if known and not torch.equal(checkpoint.read_flat(spec.name, start, stop), ours):
                    raise MismatchError(
                        f"expert {expert!r}: the integers of {spec.name!r} in {checkpoint.specs[spec.name].file} are "
                        "not the base's"
                    )
            yield start, ours


def _prepasses(plan: MergePlan, measured: Mapping[str, Checkpoint], entries: int) -> dict[str, Statistics]:
    """What each method of the recipe finds in its pass over the whole model, if it makes one, and what was measured."""

    def model() -> Iterator[Chunk]:
        for spec in plan.merged:
            yield from plan.chunks(spec.name, entries)

    methods = {method.model_dump_json(): method for method in (plan.method(spec.name) for spec in plan.merged)}
    return {settings: Statistics(method.prepass(model), data=measured) for settings, method in methods.items()}


def _is_intact(writer: CheckpointWriter, name: str, digest: str) -> bool:
    file, offset, size = writer.places[name]
    found = hashlib.sha256()
    with (writer.folder / file).open("rb") as opened:
        opened.seek(offset)
        while size and (part := opened.read(min(size, 1 << 24))):
            found.update(part)
            size -= len(part)
    return found.hexdigest() == digest


def fingerprint(plan: MergePlan) -> dict[str, object]:
    """What an interrupted run must have had in common with this one to be gone on with."""
    models = (plan.reference, *plan.experts.values())
    files = [*plan.merge.calibration.values(), *(spec.file for model in models for spec in model.specs.values())]
    version = importlib.metadata.version("twinmerge")
    return fingerprint_of(files, recipe=sha256_of_json(repr(plan.merge)), version=version)


def _copy_side_files(plan: MergePlan, folder: Path) -> None:
    """Config, tokenizer and processor files of the reference; the config says the result's dtype and labels."""
    if not plan.reference.path.is_dir():
        return
    copy_side_files(plan.reference.path, folder)
    config = folder / "config.json"
    labels = plan.labels.names
    if (plan.merge.dtype or labels or plan.merge.pieces) and config.exists():
        content = dict(plan.reference.config)
        for key in ("dtype", "torch_dtype") if plan.merge.dtype else ():
            if key in content:
                content[key] = str(plan.merge.dtype).removeprefix("torch.")
        if labels:
            content["id2label"] = {str(row): label for row, label in enumerate(labels)}
            content["label2id"] = {label: row for row, label in enumerate(labels)}
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _manifest(plan: MergePlan, folder: Path, hash_inputs: bool) -> dict[str, Any]:
    merge = plan.merge
    inputs = {merge.sources[model.path]: model for model in plan.inputs}
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(folder.glob("*.safetensors"))
    }
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: importlib.metadata.version(name) for name in ("twinmerge", "torch")},
        "recipe": merge.record(),
        "inputs": [describe_input(model, source, whole=hash_inputs).content() for source, model in inputs.items()],
        "tensors": len(plan.specs),
        "files": files,
        "notes": [merge.portable(note) for note in plan.notes],
    }
