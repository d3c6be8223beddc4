"""Opens and matches every file of a static merge, before any work, and reads them stretch by stretch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from twinmerge.errors import MismatchError, RecipeError
from twinmerge.files.checkpoint import Checkpoint, TensorSpec
from twinmerge.merging.align import Labels, align, backbone_root, order_labels
from twinmerge.merging.average import Average
from twinmerge.merging.executor import OWN_BYTES
from twinmerge.merging.method import Chunk, Method
from twinmerge.merging.recipe import StaticMerge, depths
from twinmerge.merging.slices import as_deep_as, assemble
from twinmerge.merging.tokenizer import missing_template
from twinmerge.models.compatible import (
    Allow,
    compare_configs,
    compare_dtypes,
    compare_vocabularies,
    plausible_bound,
    require_plausible,
    require_related,
    require_values,
)

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
    copied: frozenset[str]
    """What only the reference has, beside the backbone, and the result gets from it."""
    labels: Labels
    depths: Mapping[str, float]
    notes: tuple[str, ...]
    """Differences that were allowed, and what is unusual."""
    allow: Allow
    inputs: tuple[Checkpoint, ...] = ()
    """Every model that is read, as it lies on disk."""

    @property
    def merged(self) -> list[TensorSpec]:
        """Those of `specs` that are merged."""
        return [spec for spec in self.specs if spec.dtype.is_floating_point and spec.name not in self.copied]

    @property
    def read_bytes(self) -> int:
        """Bytes of all inputs' tensors."""
        inputs = {id(model): model for model in (self.reference, self.base, *self.experts.values()) if model}
        return sum(model.nbytes for model in inputs.values())

    @property
    def write_bytes(self) -> int:
        """Bytes of the result's tensors."""
        return sum(spec.numel * spec.dtype.itemsize for spec in self.specs)

    def method(self, name: str) -> Method:
        """The method that merges a tensor; one that only the reference has is the average of that."""
        return Average() if name in self.copied else self.merge.methods.at(name, self.depths[name])

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

    def chunks(self, name: str, entries: int, whole: bool = False) -> Iterator[Chunk]:
        """Go through one tensor of all models, refusing values that no fine-tune has.

        Args:
            name: of the tensor.
            entries: in a chunk.
            whole: give the tensor as one chunk in its shape.

        Raises:
            CheckpointError: naming file and tensor of NaN, Inf or values out of all proportion.
        """
        spec = self.reference.specs[name]
        reference = self.base or self.reference
        whose = "base" if self.base else "reference"
        shape = spec.shape if whole else (-1,)
        for start, stop in stretches(spec.numel, max(spec.numel, 1) if whole else entries):
            first = reference.read_flat(name, start, stop)
            largest = require_plausible(first, f"{whose}: {name!r} in {reference.specs[name].file}", start)
            bound = None if self.allow.unrelated else plausible_bound(largest)
            experts = {}
            for expert, checkpoint in ({"": reference} if name in self.copied else self.experts).items():
                tensor = first if checkpoint is reference else self._read(expert, name, start, stop)
                if checkpoint is not reference:
                    where = f"expert {expert!r}: {name!r} in {checkpoint.specs[name].file}"
                    require_plausible(tensor, where, start, bound)
                experts[expert] = tensor.view(shape)
            yield Chunk(name, start, first.view(shape) if self.base else None, experts)

    def _read(self, expert: str, name: str, start: int, stop: int) -> Tensor:
        """Entries of an expert's tensor, the rows of its head in the order of the reference's labels."""
        checkpoint, rows = self.experts[expert], self.labels.rows.get(expert)
        if rows is None or name not in self.labels.tensors:
            return checkpoint.read_flat(name, start, stop)
        return checkpoint.read(name)[rows].flatten()[start:stop]

    def require_related(self) -> None:
        """Refuse models that are no fine-tunes of the reference.

        Raises:
            MismatchError: with the measured distance.
        """
        root = backbone_root(self.merged)
        names = [spec.name for spec in self.merged if len(spec.shape) > 1 and spec.name.startswith(root)]
        for name, expert in self.experts.items():
            if expert is not self.reference and not self.allow.unrelated:
                require_related(self.reference, name, expert, [(n, n) for n in names], ", or --allow-unrelated")


def stretches(numel: int, entries: int) -> Iterator[tuple[int, int]]:
    """First entry and the one after the last of every stretch of a tensor."""
    return ((start, min(start + entries, numel)) for start in range(0, numel, entries))


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
            require_values(opened[path])
        return opened[path]

    def model(name: str, path: Path) -> Checkpoint:
        return assemble(merge.pieces[name], opened) if name in merge.pieces else open_once(path)

    if not merge.pieces:
        open_once(merge.reference)
    for piece in [piece for parts in merge.pieces.values() for piece in parts]:
        open_once(piece.path)
    found = {name: model(name, path) for name, path in merge.experts.items()}
    base = model("", merge.base) if merge.base else None
    reference = base or (next(iter(found.values())) if merge.pieces else opened[merge.reference])
    experts, copied, notes = _align_all(reference, found)
    for name, expert in experts.items():
        notes += compare_dtypes(reference, name, expert, {n: n for n in expert.specs if n in reference.specs})
    compared = {p.model: opened[p.path] for parts in merge.pieces.values() for p in parts} or experts
    for name, other in compared.items():
        notes += compare_configs(reference, name, as_deep_as(other, reference) if merge.pieces else other, allow)
        notes += compare_vocabularies(reference.path, name, other.path, allow)
    if merge.tokenizer.alike:
        others = [other.path for other in opened.values()] + [merge.tokenizer.source or reference.path]
        _require_one_vocabulary(reference.path, others)
    specs = tuple(
        replace(spec, dtype=merge.dtype) if merge.dtype and spec.dtype.is_floating_point else spec
        for spec in reference.specs.values()
    )
    merged = [name for name, spec in reference.specs.items() if spec.dtype.is_floating_point and name not in copied]
    labels = order_labels(reference, experts, merged)
    if note := missing_template(merge.tokenizer, [model.path for model in opened.values()]):
        notes.append(note)
    deep, notes = depths(list(reference.specs)), [*notes, *labels.notes]
    plan = MergePlan(
        merge, reference, base, experts, specs, copied, labels, deep, tuple(notes), allow, tuple(opened.values())
    )
    for spec in plan.merged:
        if fault := plan.method(spec.name).misfit(experts):
            raise RecipeError(fault)
    return plan


def _require_one_vocabulary(reference: Path, others: Sequence[Path]) -> None:
    for other in others:
        if found := list(compare_vocabularies(reference, str(other), other, Allow(vocabulary=True))):
            raise MismatchError(
                f"tokenizer: {found[0]}; rows of embeddings are merged as they lie, so all models must have one "
                "vocabulary for another tokenizer than the base's"
            )


def _align_all(
    reference: Checkpoint, models: Mapping[str, Checkpoint]
) -> tuple[dict[str, Checkpoint], frozenset[str], list[str]]:
    """The models under the reference's names, what only the reference has, and what is left out or copied."""
    found = {name: align(reference, name, model) for name, model in models.items()}
    copied = frozenset[str]().union(*(aligned.lacking for aligned in found.values()))
    notes = [
        f"{name!r}: what lies beside its backbone is not merged and left out: {_some(aligned.head)}"
        for name, aligned in found.items()
        if aligned.head
    ]
    if copied:
        notes.append(f"no expert has what is taken from {reference.path.name} as it is: {_some(sorted(copied))}")
    for name, aligned in found.items():
        if some := sorted(copied - aligned.lacking):
            other = next(other for other, one in found.items() if some[0] in one.lacking)
            raise MismatchError(
                f"{other!r} lacks {some[0]!r}, which {name!r} has; give models that all have it, or none of them"
            )
    return {name: aligned.checkpoint for name, aligned in found.items()}, copied, notes


def _some(names: Sequence[str]) -> str:
    return f"{names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
