"""Says what a merge or a build will take, before it runs: tensors, bytes, memory."""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twinmerge.files.checkpoint import TensorSpec
from twinmerge.jobs.measure import for_merge, for_twin
from twinmerge.jobs.preflight import checked
from twinmerge.merging.executor import OWN_BYTES, Executor
from twinmerge.merging.plan import MergePlan
from twinmerge.merging.slices import layer_count
from twinmerge.models.compatible import VOCABULARY_FILES
from twinmerge.twin.budget import Needs
from twinmerge.twin.plan import MATRICES, Plan


def describe(plan: MergePlan, memory_bytes: int, executor: Executor, folder: Path) -> dict[str, Any]:
    """What `merge` would read, write and need; reads headers and configs.

    Args:
        plan: of the merge.
        memory_bytes: what a process may take.
        executor: where tensors would be merged.
        folder: where the result would be written, for the free space.

    Raises:
        RecipeError: if the memory does not suffice.
        MismatchError: if a model is no fine-tune of the base.
    """
    plan.require_related()
    calibration = for_merge(plan)
    return {
        **plan.merge.record(),
        **(calibration.record() if calibration else {}),
        "reference": str(plan.reference.path),
        **_census(plan.specs),
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "free_bytes": shutil.disk_usage(folder).free,
        "chunk_entries": plan.chunk_entries(memory_bytes, executor.sharing),
        "memory_bytes": memory_bytes,
        "notes": list(plan.notes),
    }


def describe_twin(plan: Plan, memory_bytes: int, executor: Executor, folder: Path) -> dict[str, Any]:
    """What `build` would read, write and need; reads headers and configs.

    Args:
        plan: of the build.
        memory_bytes: what a process may take.
        executor: where parameters would be decomposed.
        folder: where the result would be written, for the free space.

    Raises:
        RecipeError: if the memory does not suffice.
    """
    found = checked(plan)
    plan, calibration = found.plan, for_twin(found)
    needs = Needs.of(plan)
    executor = needs.within(executor, memory_bytes)
    recipe = plan.recipe
    return {
        "method": recipe.shared.method,
        **(calibration.record() if calibration else {}),
        "base": str(plan.base.path),
        "experts": {
            name: {
                "source": str(expert.checkpoint.path),
                "adapter": expert.is_adapter,
                "head": expert.config.get("architectures", [None])[0] if expert.head else None,
                "head_tensors": len(expert.head),
                "answers": found.answers[name].kind,
                "own": sorted(found.own[name]),
            }
            for name, expert in sorted(plan.experts.items())
        },
        "exclusive": recipe.exclusive.model_dump(exclude_none=True),
        **_census([task.spec for task in plan.tasks]),
        "kinds": dict(Counter(task.kind for task in plan.tasks)),
        "merged": sum(bool(task.experts) for task in plan.tasks),
        "decomposed": sum(task.exclusive and task.kind in MATRICES for task in plan.tasks),
        "tokenizer": _tokenizer_of(plan.base.path),
        "max_length": recipe.max_length,
        "vocabulary": plan.base.config.get("vocab_size"),
        "read_bytes": plan.base.nbytes + sum(expert.checkpoint.nbytes for expert in plan.experts.values()),
        "write_bytes": needs.result_bytes,
        "disk_bytes": needs.disk_bytes,
        "free_bytes": shutil.disk_usage(folder).free,
        "memory_bytes": memory_bytes,
        "memory_needed_bytes": OWN_BYTES + needs.memory_bytes,
        "memory_needed_by": needs.parameter,
        "router_memory_bytes": plan.base.nbytes,
        "workers": executor.workers,
        "fast": len(plan.changed) - len(plan.fallback),
        "fallback": list(plan.fallback),
        "notes": list(plan.notes),
    }


def _census(specs: Sequence[TensorSpec]) -> dict[str, Any]:
    return {
        "tensors": len(specs),
        "parameters": sum(spec.numel for spec in specs if spec.dtype.is_floating_point),
        "layers": layer_count(spec.name for spec in specs),
        "dtypes": dict(Counter(str(spec.dtype).removeprefix("torch.") for spec in specs)),
    }


def _tokenizer_of(path: Path) -> str | None:
    """The file that gives a folder's tokens their ids."""
    return next((file for file in VOCABULARY_FILES if (path / file).is_file()), None)
