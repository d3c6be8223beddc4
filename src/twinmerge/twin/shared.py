"""Merges the shared expert of a twin, one parameter at a time (METHOD §2)."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor

from twinmerge.files.checkpoint import Checkpoint
from twinmerge.merging.engine import merge_tensor, merged_chunks
from twinmerge.merging.method import Chunk, Scaled
from twinmerge.merging.statistics import Statistics
from twinmerge.models.adapter import AdapterExpert
from twinmerge.models.compatible import plausible_bound, require_plausible, require_related
from twinmerge.twin.plan import EMBEDDINGS, MATRICES, Plan, TensorTask
from twinmerge.twin.ranks import best_scaling

_CHUNK_ENTRIES = 1 << 16
"""Entries merged at a time: what they need stays in the cache."""
_ADAPTED_ENTRIES = 1 << 22
"""The same where adapters' pairs are multiplied out, which are read for each stretch."""


def prepare(plan: Plan, measured: Mapping[str, Checkpoint] = {}) -> Statistics:
    """Run the merge method's pass over all tensors, if it has one.

    Args:
        plan: of the twin.
        measured: what was measured of each expert on calibration data.
    """

    def model() -> Iterator[Chunk]:
        for task in [task for task in plan.tasks if task.experts]:
            yield from chunks_of(plan, task)

    return Statistics(plan.recipe.shared.prepass(model), data=measured)


def merge_parameter(task: TensorTask, plan: Plan, statistics: Statistics) -> tuple[Tensor, float | None]:
    """The shared tensor, rounded once to the base's dtype, and the scaling that was used.

    Raises:
        CheckpointError: if a model holds NaN, Inf or an implausible value, or the merge does.
    """
    if not task.experts or not task.spec.numel:
        return plan.base.read(task.name), None
    method, read = plan.recipe.shared, partial(chunks_of, plan, task)
    if isinstance(method, Scaled) and method.automatic:
        [(chunk, unit)] = merged_chunks(method.at(1.0), read, statistics, whole=True)
        direction = unit.sub_(chunk.base_value()).float()
        vectors = {expert: chunk.task_vector(expert) for expert in chunk.names}
        method = method.at(best_scaling(vectors, direction, _expected_rank(plan) if task.exclusive else 0))
    shared = torch.empty(task.spec.numel, dtype=task.spec.dtype)
    whole = method.takes_whole(task.name, task.spec.shape)
    for start, entries in merge_tensor(method, read, statistics, task.spec.dtype, whole=whole):
        shared[start : start + len(entries)] = entries
    return shared.view(task.spec.shape), getattr(method, "scaling", None)


def bound_of(plan: Plan, task: TensorTask, base: Tensor, start: int = 0) -> float | None:
    """The largest magnitude that is plausible in a fine-tune, where the base has these values, which must be finite."""
    largest = require_plausible(base, f"base: {task.name!r} in {task.spec.file}", start)
    return None if plan.allow.unrelated else plausible_bound(largest)


def require_fine_tunes(plan: Plan) -> None:
    """Refuse experts whose matrices do not resemble the base's: they are no fine-tunes of it."""
    kinds = ("vector", *EMBEDDINGS)
    linear = [task.name for task in plan.tasks if task.kind not in kinds and len(task.spec.shape) > 1]
    for name in () if plan.allow.unrelated else sorted(plan.experts):
        expert = plan.experts[name]
        pairs = [(own, expert.stored[own]) for own in linear if own in expert.stored]
        require_related(plan.base, name, expert.checkpoint, pairs, ", or --allow-unrelated")


def chunks_of(plan: Plan, task: TensorTask, whole: bool = False) -> Iterator[Chunk]:
    """One parameter of all models, finite; in stretches, unless it is asked for whole."""
    adapters = [name for name in task.experts if isinstance(plan.experts[name], AdapterExpert)]
    entries = task.spec.numel if whole else _ADAPTED_ENTRIES if adapters else _CHUNK_ENTRIES
    shape = task.spec.shape if whole else (-1,)
    for start in range(0, task.spec.numel, max(entries, 1)):
        stop = min(start + entries, task.spec.numel)
        base = plan.base.read_flat(task.name, start, stop)
        bound = bound_of(plan, task, base, start)
        experts = {
            name: plan.experts[name].read_flat(task.name, start, stop, bound).view(shape)
            for name in task.experts
            if name not in adapters
        }
        changes = {
            name: cast(AdapterExpert, plan.experts[name])
            .change_flat(task.name, base, start, task.spec.shape, bound)
            .view(shape)
            for name in adapters
        }
        yield Chunk(task.name, start, base.view(shape), experts, changes)


def _expected_rank(plan: Plan) -> int:
    """The rank that is kept, or the mean rank that a budget allows; 0 where an energy decides."""
    if plan.recipe.exclusive.rank is not None:
        return plan.recipe.exclusive.rank
    if plan.budget_bytes is None:
        return 0
    matrices = [task for task in plan.tasks if task.kind in MATRICES and task.exclusive]
    per_rank = sum(plan.direction_bytes(task) * len(task.experts) for task in matrices)
    return round(plan.budget_bytes / per_rank) if per_rank else 0
