"""What a machine can do at most, and what a pass of an encoder asks of it: the bound of bench_inference.py's curves."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.contestants import Encoder


def machine(clock: Callable[[], float]) -> tuple[float, float]:
    """Measured: multiply-adds in float32 as FLOP/s of a large square product, and bytes/s of a copy past the caches."""
    a, b = torch.randn(2, 1536, 1536)
    source, target = torch.randn(2, 2**25)

    def best(run: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(6):
            started = clock()
            run()
            seconds.append(clock() - started)
        return min(seconds)

    return 2 * 1536**3 / best(lambda: a @ b), 2 * source.nbytes / best(lambda: target.copy_(source))


def total_work(ours: Encoder, twin: bool, sizes: Mapping[str, int]) -> list[tuple[float, float]]:
    """FLOPs and bytes of every large step of a pass: linear layers, attention, and what the twin adds to them.

    One expert a row, so a row's own ranks are `rank`; bytes count every operand and result once, float32.
    """
    rows, length, rank = (sizes[name] for name in ("batch", "length", "rank"))
    tokens = rows * length
    steps: list[tuple[float, float]] = []
    for name, value in ours.shared.items():
        if value.ndim != 2 or "embed" in name:
            continue
        out, inner = value.shape
        seen = rows if "pooler" in name else tokens
        steps.append((2.0 * seen * inner * out, 4.0 * (seen * inner + inner * out + seen * out)))
        if twin:
            copies = 3 * rows * rank if rows > 1 else rank  # a row's ranks are read, written and read again
            reads_x = 0 if name.endswith(("key.weight", "value.weight")) else seen * inner  # read once for q, k, v
            steps.append((2.0 * seen * inner * rank, 4.0 * (reads_x + copies * inner + seen * rank)))
            steps.append((2.0 * seen * rank * out, 4.0 * (seen * rank + copies * out + 2 * seen * out)))
    hidden, depth = ours.static.config.hidden_size, ours.static.config.num_hidden_layers
    steps += [(4.0 * rows * length**2 * hidden, 16.0 * tokens * hidden)] * depth
    return steps
