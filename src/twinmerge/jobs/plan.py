"""Knows what a merge or a build will take, before it runs: bytes, memory, and the time a sample of it took."""

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from twinmerge.files.checkpoint import TensorSpec
from twinmerge.merging.engine import MergePlan, read_chunks
from twinmerge.merging.executor import OWN_BYTES, Executor
from twinmerge.merging.recipe import layer_count
from twinmerge.merging.rules import Chunk, RegistryRule
from twinmerge.models.compatible import VOCABULARY_FILES
from twinmerge.twin.budget import Needs
from twinmerge.twin.plan import MATRICES, Plan
from twinmerge.twin.ranks import compress

_SAMPLE_CHUNKS = 16
_SAMPLE_SIZES = 256, 512
"""Sides of the matrices whose decomposition is timed."""
_SAMPLE_ENTRIES = 1 << 18
"""Entries whose merge is timed."""


def describe(plan: MergePlan, memory_bytes: int, executor: Executor, folder: Path) -> dict[str, Any]:
    """What `merge` would read, write and need; reads headers, configs and a sample of one tensor.

    Args:
        plan: of the merge.
        memory_bytes: what a process may take.
        executor: where tensors would be merged.
        folder: where the result would be written, for the free space.

    Raises:
        RecipeError: if the memory does not suffice.
        CheckpointError: if the sample cannot be read or holds NaN or Inf.
    """
    entries = plan.chunk_entries(memory_bytes, executor.sharing)
    seconds, basis = _estimate(plan, entries, executor.workers)
    return {
        **plan.merge.record(),
        "reference": str(plan.reference.path),
        **_census(plan.specs),
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "free_bytes": shutil.disk_usage(folder).free,
        "chunk_entries": entries,
        "memory_bytes": memory_bytes,
        "estimated_s": seconds,
        "estimate_basis": basis,
        "notes": list(plan.notes),
    }


def describe_twin(plan: Plan, memory_bytes: int, executor: Executor, folder: Path) -> dict[str, Any]:
    """What `build` would read, write and need; reads headers and configs, and times a sample of random numbers.

    Args:
        plan: of the build.
        memory_bytes: what a process may take.
        executor: where parameters would be decomposed.
        folder: where the result would be written, for the free space.

    Raises:
        RecipeError: if the memory does not suffice.
    """
    needs = Needs.of(plan)
    executor = needs.within(executor, memory_bytes)
    seconds, basis = _estimate_twin(plan, executor.workers)
    recipe = plan.recipe
    return {
        "method": recipe.shared.method,
        "base": str(plan.base.path),
        "experts": {
            name: {
                "source": str(expert.checkpoint.path),
                "adapter": expert.is_adapter,
                "head": expert.config.get("architectures", [None])[0] if expert.head else None,
                "head_tensors": len(expert.head),
                "tokenizer": _tokenizer_of(expert.checkpoint.path),
            }
            for name, expert in sorted(plan.experts.items())
        },
        "exclusive": recipe.exclusive.model_dump(exclude_none=True),
        **_census([task.spec for task in plan.tasks]),
        "kinds": dict(Counter(task.kind for task in plan.tasks)),
        "merged": sum(bool(task.experts) for task in plan.tasks),
        "decomposed": sum(task.exclusive and task.kind in MATRICES for task in plan.tasks),
        "tokenizer": _tokenizer_of(plan.base.path),
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
        "estimated_s": seconds,
        "estimate_basis": basis,
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


def _estimate_twin(plan: Plan, workers: int) -> tuple[float, str]:
    """Seconds for merging and decomposing, from random matrices of two sizes, and what was measured.

    Adapters' factors cost next to nothing and are left out.
    """
    full = {name for name, expert in plan.experts.items() if not expert.is_adapter}
    tasks = [task for task in plan.tasks if task.exclusive and task.kind in MATRICES and full & set(task.experts)]
    small, large = (_decomposition_s(plan, size) for size in _SAMPLE_SIZES)
    power = min(max(math.log(large / small) / math.log(_SAMPLE_SIZES[1] / _SAMPLE_SIZES[0]), 2.0), 3.0)
    decomposing = 0.0
    for task in tasks:
        short, long = sorted(task.matrix_shape)
        count = len(full & set(task.experts))
        decomposing += count * large * (long / short) * (short / _SAMPLE_SIZES[1]) ** power
    entries = sum(task.spec.numel for task in plan.tasks if task.experts)
    merging = _merging_s(plan) * entries
    basis = (
        f"decomposing a square random matrix took {small:.4f} s at {_SAMPLE_SIZES[0]} and {large:.4f} s at "
        f"{_SAMPLE_SIZES[1]}, so it grows with the power {power:.2f} of the shorter side: {decomposing:,.0f} s for "
        f"{len(tasks)} matrices of {len(full)} full experts; merging {_SAMPLE_ENTRIES:,} random entries: "
        f"{merging:,.0f} s for all {entries:,}; {workers} workers assumed to share both evenly; reading, writing and "
        "the router are not in it"
    )
    return (decomposing + merging) / workers, basis


def _decomposition_s(plan: Plan, size: int) -> float:
    """Seconds that one square matrix of random numbers takes on one thread."""
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    settings = plan.recipe.exclusive

    def work() -> None:
        compress(matrix, settings, seed=0, expert="sample", name="sample")

    return _timed(work)


def _merging_s(plan: Plan) -> float:
    """Seconds an entry, on one thread, of as many random task vectors as there are experts."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(_SAMPLE_ENTRIES, generator=generator)
    experts = {name: base + 0.01 * torch.randn(_SAMPLE_ENTRIES, generator=generator) for name in plan.experts}
    params = plan.recipe.shared
    if getattr(params, "scaling", None) == "auto":
        params = params.model_copy(update={"scaling": 1.0})
    rule = RegistryRule(params, dict.fromkeys(plan.experts, 0.0))
    chunk = Chunk("sample", 0, base, experts)

    def work() -> None:
        rule.merge(chunk, rule.measure(lambda: iter([chunk])))

    return _timed(work) / _SAMPLE_ENTRIES


def _timed(work: Callable[[], None]) -> float:
    """Seconds on one thread, the less of two runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(2):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return min(times)


def _estimate(plan: MergePlan, entries: int, workers: int) -> tuple[float, str]:
    """Seconds for the whole merge, from the time the first chunks of the largest tensor took, and what those were."""
    floating = [spec for spec in plan.specs if spec.dtype.is_floating_point and spec.numel]
    if not floating:
        return 0.0, "nothing is merged"
    largest = max(floating, key=lambda spec: spec.numel)
    rule = plan.merge.rule(largest.name, plan.depths[largest.name], dict.fromkeys(plan.experts, 0.0))

    def sample() -> list[Chunk]:
        return list(islice(read_chunks(plan, largest.name, entries), _SAMPLE_CHUNKS))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.perf_counter()
        chunks = sample()
        measured = rule.measure(lambda: iter(chunks))
        for chunk in chunks:
            rule.merge(chunk, measured).to(largest.dtype)
        took = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    done = min(largest.numel, entries * _SAMPLE_CHUNKS)
    total = sum(spec.numel for spec in floating)
    basis = (
        f"{done:,} of {total:,} entries, the first of {largest.name!r}, were read and merged in {took:.3f} s by one "
        f"worker; {workers} workers assumed to share the rest evenly; writing is not in it"
    )
    return took / done * total / workers, basis
