"""Knows what a static merge will take, before it runs: bytes, memory, and the time a sample of it took."""

import shutil
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from twinmerge.twin.merge import MergePlan, read_chunks
from twinmerge.twin.merge_recipe import layer_count
from twinmerge.twin.rules import Chunk

_SAMPLE_CHUNKS = 16


def describe(plan: MergePlan, memory_bytes: int, workers: int, folder: Path) -> dict[str, Any]:
    """What `merge` would read, write and need; reads headers, configs and a sample of one tensor.

    Args:
        plan: of the merge.
        memory_bytes: what the process may take.
        workers: tensors in work at a time.
        folder: where the result would be written, for the free space.

    Raises:
        RecipeError: if the memory does not suffice.
        CheckpointError: if the sample cannot be read or holds NaN or Inf.
    """
    entries = plan.chunk_entries(memory_bytes, workers)
    seconds, basis = _estimate(plan, entries, workers)
    return {
        **plan.merge.record(),
        "reference": str(plan.reference.path),
        "tensors": len(plan.specs),
        "parameters": sum(spec.numel for spec in plan.specs if spec.dtype.is_floating_point),
        "layers": layer_count(plan.reference.specs),
        "dtypes": dict(Counter(str(spec.dtype).removeprefix("torch.") for spec in plan.specs)),
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "free_bytes": shutil.disk_usage(folder).free,
        "chunk_entries": entries,
        "memory_bytes": memory_bytes,
        "estimated_s": seconds,
        "estimate_basis": basis,
        "notes": list(plan.notes),
    }


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
