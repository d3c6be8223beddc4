"""Knows what building a twin takes: memory for each parameter in work, and room on the disk."""

from dataclasses import dataclass, replace

from twinmerge.errors import RecipeError
from twinmerge.merging.executor import OWN_BYTES, Executor, Threads
from twinmerge.twin.plan import MATRICES, Plan, TensorTask, moment_bytes, weighted

_GRAM_ROWS = 4096
"""Rows of a matrix that are in float64 at a time while it is decomposed."""
_MOMENT_COPIES = 7
"""Of a second moment: as it is read, and in float64 with its damped copy and its root."""


@dataclass(frozen=True)
class Needs:
    """What a build takes, from names and shapes alone; upper bounds."""

    memory_bytes: int
    """Of the parameter that takes most."""
    parameter: str
    """Which one that is."""
    parts_bytes: int
    """Files that only the work needs."""
    result_bytes: int
    """The twin's weights."""

    @classmethod
    def of(cls, plan: Plan) -> "Needs":
        """What a plan's build takes."""
        memory, parameter = max((_memory(plan, task), task.name) for task in plan.tasks)
        heads = sum(e.head_source(n).specs[n].nbytes for e in plan.experts.values() for n in e.head)
        compressed = sum(_stored(plan, task) for task in plan.tasks)
        measured = sum(moment_bytes(task) * len(task.experts) for task in weighted(plan))
        kept = compressed if plan.budget_bytes is None else min(compressed, plan.budget_bytes + plan.vector_bytes)
        return cls(memory, parameter, plan.base.nbytes + compressed + measured, plan.base.nbytes + heads + kept)

    @property
    def disk_bytes(self) -> int:
        """Room that the build takes, the most at a time."""
        return self.parts_bytes + self.result_bytes

    def within(self, executor: Executor, memory_bytes: int) -> Executor:
        """The executor, with as many threads as the memory allows.

        Raises:
            RecipeError: if it does not suffice for one parameter.
        """
        at_once = (memory_bytes - OWN_BYTES) // max(self.memory_bytes, 1)
        if at_once < 1:
            needed = OWN_BYTES + self.memory_bytes
            raise RecipeError(
                f"--memory must be at least {needed / 1e6:,.0f} MB for {self.parameter!r}, "
                f"found {memory_bytes / 1e6:,.0f}"
            )
        return replace(executor, workers=min(executor.workers, at_once)) if isinstance(executor, Threads) else executor


def streams(plan: Plan, task: TensorTask) -> bool:
    """Whether a parameter is merged stretch by stretch, so that the merge takes no memory of the parameter's size."""
    method = plan.recipe.shared
    return not (method.takes_whole(task.name, task.spec.shape) or method.automatic)


def _memory(plan: Plan, task: TensorTask) -> int:
    """Bytes while one parameter is merged and decomposed: stored tensors, float32 differences, float64 work."""
    entries, stored = task.spec.numel, task.spec.nbytes
    count, merging = len(task.experts), stored
    if not streams(plan, task):
        merging = (count + 2) * stored + 4 * entries * (count + 10)
        merging += plan.recipe.shared.memory_bytes(task.spec.shape, count)
    if not task.exclusive:
        return merging
    decomposing = 3 * stored + 8 * entries
    if task.kind in MATRICES:
        short, long = sorted(task.matrix_shape)
        if plan.recipe.exclusive.compression == "svd":
            kept = _rank(plan, task)
            decomposing += 8 * short * (4 * short + _GRAM_ROWS) + 24 * (long + short) * kept
            decomposing += _stored(plan, task)
            if plan.recipe.exclusive.weighting != "none":
                decomposing += 24 * entries + _MOMENT_COPIES * moment_bytes(task)
        else:
            decomposing += 24 * entries
    return max(merging, decomposing)


def _rank(plan: Plan, task: TensorTask) -> int:
    """Directions of a matrix that are kept until an energy or a budget chooses."""
    short = min(task.matrix_shape)
    settings = plan.recipe.exclusive
    return short if settings.rank is None else min(settings.rank, short)


def _stored(plan: Plan, task: TensorTask) -> int:
    """Bytes of a parameter's exclusive parts, of all experts."""
    if not task.exclusive:
        return 0
    density, size = plan.recipe.exclusive.density, task.spec.dtype.itemsize
    if task.kind not in MATRICES:
        one = task.spec.nbytes
    elif density is not None:
        one = round(density * task.spec.numel) * (size + 4)
    else:
        one = _rank(plan, task) * plan.direction_bytes(task)
    return one * len(task.experts)
