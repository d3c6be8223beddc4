"""What does a mixed batch cost on an accelerator, and does the host ever wait for it inside the model?

Expected: a gated pass takes at most 1.25 times the static model's at 32 rows of 64 tokens; between two layers nothing
waits for the device: a mixed batch makes no more synchronisations than the static model, plus those of its gates.

A random BERT with eight experts of rank 8, one expert a row, first held against dense weights; then contestants in
turns, each turn timed to the device's end; medians of ratios to the static model in the same turn. Synchronisations are
those that torch reports (CUDA only). Without an accelerator `--device cpu` runs the same program.

    python benchmarks/bench_device.py --device cuda [--layers 12] [--hidden 768] [--dtype bfloat16]
"""

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contestants import EXPERTS, RANK, SEED, random_inputs, synthetic_experts
from twinmerge.hf.model import TwinModel
from twinmerge.runtime.compose import theta

ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest difference from dense weights, of states of size 1."""


def waits(run: Callable[[], Any], device: torch.device) -> int | None:
    """How often the host waits for the device; None where that is not told."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return len(caught)


def main() -> None:
    """Check, count, time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(SEED)
    config = BertConfig(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        intermediate_size=4 * options.hidden,
    )
    static: Any = BertModel(config)
    static = static.eval().to(dtype)
    exclusive = synthetic_experts(static, EXPERTS, RANK)
    twin = TwinModel(copy.deepcopy(static), exclusive)
    gate = torch.eye(EXPERTS)[torch.arange(options.rows) % EXPERTS]
    first = dict(theta(dict(static.named_parameters()), list(exclusive.values()), gate[0]))
    static, twin, gate = static.to(device), twin.to(device), gate.to(device)
    inputs = {name: value.to(device) for name, value in random_inputs(options.rows, options.tokens).items()}
    runs: dict[str, Callable[[], Any]] = {
        "static": lambda: static(**inputs)[0],
        "twin, one expert a row": lambda: twin.encode(gate, **inputs)[0],
    }
    with torch.inference_mode():
        found = runs["twin, one expert a row"]()[0].float().cpu()
        static.load_state_dict({name: value.to(device) for name, value in first.items()}, strict=False)
        difference = float((found - runs["static"]()[0].float().cpu()).abs().max())
        if difference > ALLOWED[dtype]:
            raise SystemExit(f"a gated row differs from dense weights by {difference}")
        counts = {name: waits(run, device) for name, run in runs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.repeats):
            for name, run in runs.items():
                started = time.perf_counter()
                run()
                if device.type != "cpu":
                    torch.accelerator.synchronize()
                seconds[name].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(seconds["twin, one expert a row"], seconds["static"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"{name}, {options.dtype}: x{statistics.median(ratios):.3f} [{low:.3f} {high:.3f}], waits {counts}")
    record = {"device": name, "dtype": options.dtype, "ratio": statistics.median(ratios), "quartiles": [low, high]}
    print(json.dumps({**record, "waits": counts, "largest_difference": difference, **vars(options)}))


if __name__ == "__main__":
    main()
