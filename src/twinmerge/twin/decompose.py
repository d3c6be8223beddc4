"""Turns weights into a twin: every parameter decomposed on its own, then ranks chosen, then files assembled."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.hashes import sha256_of
from twinmerge.files.progress import Progress, silent
from twinmerge.files.strict_json import read_json
from twinmerge.files.writer import CheckpointWriter, copy_side_files, save_tensors
from twinmerge.merging.executor import Executor, make_executor
from twinmerge.merging.method import Scaled
from twinmerge.merging.statistics import Statistics
from twinmerge.tensors.difference import require_finite
from twinmerge.tensors.float8 import EIGHT_BITS, to_eight_bits
from twinmerge.tensors.int4 import FOUR_BITS, FourBits, to_four_bits
from twinmerge.tensors.low_rank import LowRank, as_matrix, kept_energy
from twinmerge.tensors.parts import LEAVES, STORED_ONLY, Dense, Part, unpack
from twinmerge.tensors.whitening import Whitening
from twinmerge.twin.artifact import write_exclusive
from twinmerge.twin.plan import BATCH_STATISTICS, MATRICES, Plan, TensorTask
from twinmerge.twin.ranks import Key, choose_ranks, compress, compress_factors
from twinmerge.twin.shared import bound_of, chunks_of, merge_parameter, prepare
from twinmerge.twin.weighting import Weighting


@dataclass(frozen=True)
class TensorRecord:
    """What decomposing one parameter found; its tensors lie in the part file."""

    name: str
    scaling: float | None
    energies: Mapping[str, float]
    """||expert - shared||_F^2 before compression, by expert."""
    spectra: Mapping[str, Tensor]
    """Singular values, by expert; empty where nothing was decomposed."""
    part: Path
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    """How much of the energy the first 0, 1, ... directions keep as they are stored, by expert, where it is not the
    spectrum's."""

    @classmethod
    def load(cls, name: str, part: Path) -> "TensorRecord":
        """What `decompose_tensor` wrote beside the tensors."""
        written = Checkpoint.open(part)

        def numbers(leaf: str) -> dict[str, Tensor]:
            return {n.removesuffix(leaf): written.read(n) for n in written.specs if n.endswith(leaf)}

        found = numbers("/scaling").get("shared")
        energies = {expert: float(value) for expert, value in numbers("/energy").items()}
        scaling = None if found is None else float(found)
        return cls(name, scaling, energies, numbers("/spectrum"), part, numbers("/kept"))

    def energy_of(self, expert: str, rank: int) -> float:
        """How much of ||expert - shared||_F^2 the first `rank` directions keep."""
        if expert in self.kept:
            return float(self.kept[expert][rank])
        return float(self.spectra[expert][:rank].double().square().sum())

    def exclusive(self, expert: str, shape: tuple[int, int]) -> Part | None:
        """What the part file holds of an expert, None for a difference of zero."""
        written = Checkpoint.open(self.part)
        leaves = {leaf: written.read(f"{expert}/{leaf}") for leaf in LEAVES if f"{expert}/{leaf}" in written.specs}
        return unpack(leaves, shape) if leaves else None


@dataclass(frozen=True)
class WeightsReport:
    """What `write_weights` did, for the manifest."""

    tensors: dict[str, dict[str, Any]]
    experts: dict[str, dict[str, Any]]


def write_weights(
    plan: Plan,
    folder: Path,
    work: Path,
    progress: Progress = silent,
    *,
    executor: Executor | None = None,
    finished: Mapping[str, str] = {},
    record: Callable[[str, str], None] = lambda name, digest: None,
    measured: Mapping[str, Checkpoint] = {},
    weighting: Weighting | None = None,
) -> WeightsReport:
    """Write the shared expert, the exclusive parts and the heads.

    Args:
        plan: what to build.
        folder: the twin's folder, exists.
        work: an existing folder for part files, one for every parameter.
        progress: told after every parameter.
        executor: where parameters are decomposed; None takes a thread for every core. The result has the same bits.
        finished: parameters whose part files an interrupted run left in `work`, and their SHA-256, which is verified.
        record: told the name and the SHA-256 of every part file that is complete.
        measured: what was measured of each expert on calibration data, where the merge method needs it.
        weighting: what directions are weighed by; None weighs all alike.
    """
    work_on = _Decompose(plan, prepare(plan, measured), work, weighting=weighting)
    records = _decompose_all(work_on, plan.tasks, progress, executor, finished, record)
    ranks = _ranks(plan, records)
    _write_shared(plan, records, folder)
    experts = {}
    for index, name in enumerate(plan.expert_names):
        experts[name] = _write_expert(plan, name, records, ranks, folder / "experts" / name)
        progress("writing experts", index + 1, len(plan.expert_names))
    tensors = {
        task.name: {
            "kind": task.kind,
            "scaling": records[task.name].scaling,
            "ranks": {e: ranks[task.name, e] for e in task.experts if (task.name, e) in ranks},
        }
        for task in plan.tasks
    }
    return WeightsReport(tensors, experts)


@dataclass(frozen=True)
class _Decompose:
    """Decomposes one parameter into its part file; run twice it writes the same bytes."""

    plan: Plan
    statistics: Statistics
    work: Path
    shared: Checkpoint | None = None
    """The shared expert, where it is there already."""
    weighting: Weighting | None = None

    def part(self, name: str) -> Path:
        """The part file of a parameter, whose name may be no file's."""
        return self.work / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"

    def __call__(self, task: TensorTask) -> str:
        """The SHA-256 of the part file."""
        stored = self.shared.read(task.name) if self.shared else None
        return sha256_of(
            decompose_tensor(
                task, self.plan, self.statistics, self.part(task.name), stored, weighting=self.weighting
            ).part
        )


def _decompose_all(
    work: _Decompose,
    tasks: Sequence[TensorTask],
    progress: Progress,
    executor: Executor | None,
    finished: Mapping[str, str],
    record: Callable[[str, str], None],
) -> dict[str, TensorRecord]:
    """Decompose what no verified part file holds yet, the largest first."""
    done = {
        name for name, digest in finished.items() if work.part(name).exists() and sha256_of(work.part(name)) == digest
    }
    left = sorted((task for task in tasks if task.name not in done), key=lambda task: -task.spec.numel)
    if done:
        progress("decomposing", len(done), len(tasks))
    for count, (finding, digest) in enumerate((executor or make_executor("threads")).map(work, left), len(done) + 1):
        record(finding.name, digest)
        progress("decomposing", count, len(tasks))
    return {task.name: TensorRecord.load(task.name, work.part(task.name)) for task in tasks}


def add_expert(
    plan: Plan,
    shared: Checkpoint,
    folder: Path,
    work: Path,
    progress: Progress = silent,
    *,
    finished: Mapping[str, str] = {},
    record: Callable[[str, str], None] = lambda name, digest: None,
    weighting: Weighting | None = None,
) -> WeightsReport:
    """Write the exclusive part and the head of the one expert that a plan opened; the shared expert stays as it is.

    Args:
        plan: of `make_plan(..., only=name)`.
        shared: the twin's shared expert.
        folder: `experts/NAME`, created.
        work: an existing folder for part files.
        progress: told after every parameter.
        finished: as for `write_weights`.
        record: as for `write_weights`.
        weighting: as for `write_weights`.
    """
    (name,) = plan.experts
    tasks = [task for task in plan.tasks if task.experts]
    work_on = _Decompose(plan, Statistics(), work, shared, weighting)
    records = _decompose_all(work_on, tasks, progress, None, finished, record)
    ranks = _ranks(plan, records)
    entry = _write_expert(plan, name, records, ranks, folder)
    return WeightsReport({task: {"ranks": {expert: rank}} for (task, expert), rank in ranks.items()}, {name: entry})


def decompose_tensor(
    task: TensorTask,
    plan: Plan,
    statistics: Statistics,
    part: Path,
    stored: Tensor | None = None,
    weighting: Weighting | None = None,
) -> TensorRecord:
    """Merge one parameter and compress what each expert loses by it; idempotent, writes only `part`.

    The difference is taken from the shared tensor as it is stored, so that rounding is not lost; one that is `stored`
    already is not merged again.
    """
    shared, scaling = merge_parameter(task, plan, statistics) if stored is None else (stored, None)
    tensors: dict[str, Tensor] = {"shared": shared} if stored is None else {}
    energies: dict[str, float] = {}
    spectra: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    if task.exclusive:
        base = plan.base.read(task.name)
        bound = bound_of(plan, task, base)
        factored = _factored_differences(task, plan, scaling) if stored is None else None
        for name in task.experts:
            difference: Tensor | LowRank
            if factored is not None:
                difference = factored[name]
                energies[name] = difference.energy()
            else:
                difference = plan.experts[name].task_vector(task.name, base, bound).add_(base).sub_(shared)
                energies[name] = float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
            found = _compressed(task, plan, name, difference, weighting)
            tensors |= {f"{name}/{leaf}": tensor for leaf, tensor in found.tensors.items()}
            spectra |= {} if found.spectrum is None else {name: found.spectrum}
            kept |= {} if found.kept is None else {name: found.kept}
    elif task.experts:
        energies = _lost(task, plan, shared)
    tensors |= {f"{name}/energy": torch.tensor(energy, dtype=torch.float64) for name, energy in energies.items()}
    tensors |= {f"{name}/spectrum": values for name, values in spectra.items()}
    tensors |= {f"{name}/kept": values for name, values in kept.items()}
    if scaling is not None:
        tensors["shared/scaling"] = torch.tensor(scaling, dtype=torch.float64)
    save_tensors({k: v.contiguous() for k, v in tensors.items()}, part)
    return TensorRecord(task.name, scaling, energies, spectra, part, kept)


@dataclass(frozen=True)
class _Compressed:
    """One expert's difference in one parameter, as it is stored."""

    tensors: Mapping[str, Tensor]
    spectrum: Tensor | None = None
    kept: Tensor | None = None


def _compressed(
    task: TensorTask, plan: Plan, name: str, difference: Tensor | LowRank, weighting: Weighting | None
) -> _Compressed:
    settings, where = plan.recipe.exclusive, f"{task.name!r} of expert {name!r}"
    if task.kind not in MATRICES:
        dense = Dense(cast(Tensor, difference))
        return _Compressed(_stored(dense, plan.stored_dtype(task), where) if dense.energy() else {})
    whitening = None if weighting is None else weighting.of(name, task.name, task.matrix_shape)
    part: Part
    values: Tensor | None
    if isinstance(difference, LowRank):
        part, values = compress_factors(difference, settings, whitening)
    else:
        part, values = compress(
            difference, settings, seed=plan.recipe.seed, expert=name, name=task.name, whitening=whitening
        )
    tensors = _stored(part, plan.stored_dtype(task), where, whitening)
    if values is None:
        return _Compressed(tensors)
    stored = unpack(tensors, task.matrix_shape)
    if whitening is None and not isinstance(stored, STORED_ONLY):
        return _Compressed(tensors, values)  # orthogonal directions: what they keep is their spectrum
    if not isinstance(difference, LowRank):
        difference = as_matrix(difference)
    return _Compressed(tensors, values, kept_energy(cast(LowRank, stored.to(torch.float32)), difference))


def _lost(task: TensorTask, plan: Plan, shared: Tensor) -> dict[str, float]:
    """||expert - shared||_F^2 of a parameter that is left to the shared expert, by expert."""
    lost, flat = dict.fromkeys(task.experts, 0.0), shared.view(-1)
    for chunk in chunks_of(plan, task):
        for name in task.experts:
            value = chunk.value(name).view(-1)
            value -= flat[chunk.at : chunk.at + len(value)]
            lost[name] += float(value.square().sum())
    return lost


def _factored_differences(task: TensorTask, plan: Plan, scaling: float | None) -> dict[str, LowRank] | None:
    """LoRA experts under a linear merge: D_t as stacked factors, no (out, in) matrix is formed; None for others."""
    method, svd = plan.recipe.shared, plan.recipe.exclusive.compression == "svd"
    if isinstance(method, Scaled) and scaling is not None:
        method = method.at(scaling)
    if task.kind not in MATRICES or not svd or not all(plan.experts[n].is_adapter for n in task.experts):
        return None
    coefficients = method.coefficients(task.experts)
    if coefficients is None:
        return None
    pairs = {name: plan.experts[name].factors(task.name) for name in task.experts}
    if any(pairs[n] is None and task.name in plan.experts[n].stored for n in task.experts):
        return None
    trained = {name: pair for name, pair in sorted(pairs.items()) if pair is not None}
    downs = torch.cat([pair.down for pair in trained.values()])
    result = {}
    for name in task.experts:
        ups = [pair.up * ((other == name) - coefficients[other]) for other, pair in trained.items()]
        result[name] = LowRank(torch.cat(ups, dim=1), downs)
    return result


def _ranks(plan: Plan, records: Mapping[str, TensorRecord]) -> dict[Key, int]:
    spectra = {(name, e): values for name, record in records.items() for e, values in record.spectra.items()}
    cost = {task.name: plan.direction_bytes(task) for task in plan.tasks if task.kind in MATRICES}
    return choose_ranks(spectra, plan.recipe.exclusive, budget_bytes=plan.budget_bytes, cost=cost) if spectra else {}


def _write_shared(plan: Plan, records: Mapping[str, TensorRecord], folder: Path) -> None:
    writer = CheckpointWriter.plan([task.spec for task in plan.tasks], folder)
    writer.allocate()
    for task in plan.tasks:
        writer.write(task.name, 0, Checkpoint.open(records[task.name].part).read("shared").view(-1))
    writer.finish()
    if plan.base.path.is_dir():
        copy_side_files(plan.base.path, folder)
    config = plan.base.config  # of the backbone alone, if the shared expert is that; none of a plain module
    if config and read_json(plan.base.path / "config.json") != config:
        (folder / "config.json").write_text(json.dumps(plan.base.config, indent=2) + "\n", encoding="utf-8")


def _write_expert(
    plan: Plan, name: str, records: Mapping[str, TensorRecord], ranks: Mapping[Key, int], folder: Path
) -> dict[str, Any]:
    parts: dict[str, Part] = {}
    held = 0.0
    settings = plan.recipe.exclusive
    whole = {task.name for task in plan.tasks if task.exclusive and task.name.endswith(BATCH_STATISTICS)}
    rescaled = settings.density if settings.compression == "random" and settings.density else 1.0
    for task in plan.tasks:
        part = records[task.name].exclusive(name, task.matrix_shape) if task.name in records else None
        if part is None:
            continue
        if (task.name, name) in ranks:
            factors = cast(LowRank | FourBits, part)  # only those have ranks
            rank = min(ranks[task.name, name], factors.rank)
            part = factors.truncate(rank)
            held += records[task.name].energy_of(name, rank)
        else:
            held += part.energy() * (rescaled**2 if task.kind in MATRICES else task.name not in whole)
        parts[task.name] = part
    kinds = {task.name: task.kind for task in plan.tasks}
    write_exclusive(folder, parts, kinds, {task.name: task.spec.shape for task in plan.tasks})
    _write_head(plan, name, folder / "head")
    total = sum(r.energies.get(name, 0.0) for r in records.values() if r.name not in whole)  # of another unit
    used = [ranks[key] for key in ranks if key[1] == name]
    left_out = sum(records[t.name].energies.get(name, 0.0) for t in plan.tasks if t.experts and not t.exclusive)
    return {
        "adapter": plan.experts[name].is_adapter,
        "energy": total,
        "energy_kept": min(max(held / total, 0.0), 1.0) if total else 1.0,
        "energy_left_out": left_out,
        "rank_mean": sum(used) / len(used) if used else 0.0,
        "rank_max": max(used, default=0),
    }


def _write_head(plan: Plan, name: str, folder: Path) -> None:
    head = plan.experts[name].read_head()
    if not head:
        return
    folder.mkdir()
    save_tensors(head, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(plan.experts[name].config, indent=1) + "\n", encoding="utf-8")


def _stored(part: Part, dtype: torch.dtype, where: str, whitening: Whitening | None = None) -> dict[str, Tensor]:
    """A part's tensors in the dtype that they are stored in.

    Raises:
        CheckpointError: if the dtype does not hold them.
    """
    if dtype == EIGHT_BITS:
        part = to_eight_bits(cast(LowRank, part), where)  # the recipe allows no other form
    elif dtype == FOUR_BITS:
        part = to_four_bits(cast(LowRank, part), whitening)
    else:
        part = part.to(dtype)
    found = part.pack()
    for tensor in found.values():
        if tensor.is_floating_point():
            require_finite(tensor, f"exclusive.dtype: {where} stored in {dtype}")
    return found
