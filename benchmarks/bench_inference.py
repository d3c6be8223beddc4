"""What does an exact mix of experts for every row cost, compared with one static model of the same shape?

Expected: at most 1.12 times the static model's time for a mixed batch of 32 x 64 tokens on MiniLM (8 experts, rank 8,
one expert used a row), the same with 64 experts, 1.30 with 4 experts a row, 1.20 at batch 1 x 32; a decode step of a
bf16 Llama at batch 16 at most 1.12; the published way, a dense rebuild for every sample, more than 20 times slower.

Every contestant's output is compared with the dense reference (`runtime/compose.py`) before it is timed; contestants
take turns; figures are medians of ratios to the static model in the same turn. On a machine that others use, one thread
and `--clock cpu` time the work alone.

    python benchmarks/bench_inference.py --base MINILM [--threads 2] [--clock wall] [--repeats 11] [--cases mixed ...]
"""

import argparse
import copy
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from twinmerge.runtime import compose
from twinmerge.runtime.compose import theta
from twinmerge.runtime.model import TwinModel, layer_kind, load_backbone

SEED, RANK = 0, 8
Contestants = Mapping[str, Callable[[], Any]]


def synthetic_experts(backbone: torch.nn.Module, count: int, rank: int) -> dict[str, dict[str, Any]]:
    """Exclusive parts of the right shapes for all linear layers, biases and norms."""
    from twinmerge.tensors.low_rank import LowRank

    generator = torch.Generator().manual_seed(SEED)
    shapes = {}
    for module_name, module in backbone.named_modules():
        for leaf, value in module.named_parameters(recurse=False):
            kind = layer_kind(module, leaf)
            if kind in ("linear", "vector") and "lm_head" not in module_name:
                shapes[f"{module_name}.{leaf}"] = kind, value

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def part(kind: str, like: Tensor) -> Any:
        if kind == "vector":
            return (0.02 * random(*like.shape)).to(like.dtype)
        up, down = random(like.shape[0], rank), random(rank, like.shape[1])
        return LowRank((0.02 * up).to(like.dtype), (0.05 * down).to(like.dtype))

    return {f"e{t:03d}": {name: part(*entry) for name, entry in shapes.items()} for t in range(count)}


def one_expert_gates(rows: int, experts: int) -> Tensor:
    """A largest gate of 0.9 to 1, the rest shared out evenly."""
    generator = torch.Generator().manual_seed(SEED)
    top = 0.9 + 0.1 * torch.rand(rows, 1, generator=generator)
    chosen = torch.randint(0, experts, (rows, 1), generator=generator)
    return ((1 - top) / (experts - 1)).expand(rows, experts).clone().scatter_(1, chosen, top)


def soft_gates(rows: int, experts: int) -> Tensor:
    """Four experts in every row."""
    generator = torch.Generator().manual_seed(SEED)
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:4] for _ in range(rows)])
    weights = 0.2 + torch.rand(rows, 4, generator=generator)
    return torch.zeros(rows, experts).scatter_(1, chosen, weights / weights.sum(dim=1, keepdim=True))


def turns(contestants: Contestants, repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of every contestant in every turn, after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    with torch.inference_mode():
        for run in contestants.values():
            run()
        for _ in range(repeats):
            for name, run in contestants.items():
                started = clock()
                run()
                seconds[name].append(clock() - started)
    return seconds


def summary(case: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Print and return medians of the ratios to the static model in the same turn."""
    found = {}
    for name, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times, seconds["static"], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
        median = statistics.median(times)
        found[name] = {"ms": 1e3 * median, "ratio": statistics.median(ratios), "quartiles": [low, high]}
        print(
            f"{case:14} {name:28} {1e3 * median:9.2f} ms  x{found[name]['ratio']:.3f}  [{low:.3f} {high:.3f}]",
            flush=True,
        )
    return found


class Encoder:
    """MiniLM in all its ways, on one batch."""

    def __init__(self, base: Path, experts: int) -> None:
        """Load the base as shared expert with synthetic exclusive parts."""
        self.static = load_backbone(base)
        self.exclusive = synthetic_experts(self.static, experts, RANK)
        self.shared = dict(self.static.named_parameters())
        self.twin = TwinModel(load_backbone(base), self.exclusive, kinds={})
        self.experts = experts

    def rebuilt(self, gate: Tensor) -> torch.nn.Module:
        """The dense model for one gate: the published way."""
        model = copy.deepcopy(self.static)
        model.load_state_dict(theta(self.shared, list(self.exclusive.values()), gate), strict=False)
        return model

    def published(self, gate: Tensor, inputs: dict[str, Tensor]) -> Callable[[], Any]:
        """The published way for one sample: dense exclusive vectors of all experts in memory, summed for its gate."""
        dense = [
            {name: compose.dense(part, self.shared[name].shape) for name, part in parts.items()}
            for parts in self.exclusive.values()
        ]
        model = copy.deepcopy(self.static)

        def run() -> Any:
            model.load_state_dict(theta(self.shared, dense, gate), strict=False)
            return model(**inputs)

        return run

    def check(self, gates: Tensor, inputs: dict[str, Tensor]) -> float:
        """Largest difference of any mode from the dense reference, on three rows; a mode that is off ends the run."""
        worst = 0.0
        with torch.inference_mode():
            for mode in ("auto", "all", "gather", "merge"):
                self.twin.mode = mode
                found = self.twin.encode(gates[:3], **{k: v[:3] for k, v in inputs.items()})[0]
                for row in range(min(3, len(gates))):
                    want = self.rebuilt(gates[row])(**{k: v[row : row + 1] for k, v in inputs.items()})[0][0]
                    worst = max(worst, float((found[row] - want).abs().max()))
        self.twin.mode = "auto"
        self.twin.merged.clear()
        if worst > 1e-4:
            raise SystemExit(f"outputs differ from the dense reference by {worst}")
        return worst

    def in_mode(self, mode: Any, gates: Tensor, inputs: dict[str, Tensor]) -> Callable[[], Any]:
        """The twin, one path forced."""

        def run() -> None:
            self.twin.mode = mode
            self.twin.encode(gates, **inputs)

        return run

    def peft(self, gates: Tensor, inputs: dict[str, Tensor]) -> Callable[[], Any]:
        """PEFT's mixed batch: one adapter a row, no biases and norms."""
        targets = sorted(
            {n.removesuffix(".weight") for n, v in self.shared.items() if v.ndim == 2 and "embed" not in n}
        )
        settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
        model: Any = get_peft_model(copy.deepcopy(self.static), settings, adapter_name="e000")
        for index in range(1, self.experts):
            model.add_adapter(f"e{index:03d}", settings)
        model.eval()
        names = [f"e{index:03d}" for index in gates.argmax(dim=1).tolist()]
        return lambda: model(**inputs, adapter_names=names)


def encoder_case(case: str, base: Path, options: Any, clock: Callable[[], float]) -> dict[str, Any]:
    """`mixed` 32 x 64, `soft` 4 experts a row, `single` 1 x 32."""
    from twinmerge.runtime.gating import keep_large

    rows, length = (1, 32) if case == "single" else (32, 64)
    ids = torch.randint(1000, 20000, (rows, length), generator=torch.Generator().manual_seed(SEED))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ours = Encoder(base, 8)
    gates = soft_gates(rows, 8) if case == "soft" else keep_large(one_expert_gates(rows, 8), ours.twin.drop_below)
    error = ours.check(gates, inputs)
    contestants: dict[str, Callable[[], Any]] = {"static": lambda: ours.static(**inputs)}
    contestants["twin, auto"] = ours.in_mode("auto", gates, inputs)
    if case != "single":
        contestants["twin, all"] = ours.in_mode("all", gates, inputs)
        contestants["twin, gather"] = ours.in_mode("gather", gates, inputs)
    if case == "mixed":
        many = Encoder(base, 64)
        wide = keep_large(one_expert_gates(rows, 64), ours.twin.drop_below)
        contestants["twin, auto, 64 experts"] = many.in_mode("auto", wide, inputs)
        contestants["PEFT, one adapter a row"] = ours.peft(gates, inputs)
        one = {k: v[:1] for k, v in inputs.items()}
        contestants["published, ONE sample"] = ours.published(one_expert_gates(rows, 8)[0], one)
    found = summary(case, turns(contestants, options.repeats, clock))
    if case == "mixed":
        faster = rows * found["published, ONE sample"]["ms"] / found["twin, auto"]["ms"]
        print(f"{case:14} per sample {faster:.1f} times faster than the published way")
        found["faster_than_published"] = faster
    parts = {t.data_ptr(): t.nbytes for t in [*ours.twin.parameters(), *ours.twin.buffers()]}
    found["memory_ratio"] = sum(parts.values()) / sum(p.nbytes for p in ours.static.parameters())
    found["largest_difference"] = error
    print(f"{case:14} memory x{found['memory_ratio']:.3f} of one model; largest difference {error:.1e}")
    return found


def decode_case(options: Any, clock: Callable[[], float]) -> dict[str, Any]:
    """One step of a bf16 Llama (hidden 768, 12 layers) at batch 16 on a cache of 128 tokens."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048, vocab_size=32000,
        dtype=torch.bfloat16,
    )  # fmt: skip
    static: Any = LlamaForCausalLM(config)
    static.to(torch.bfloat16).eval()
    exclusive = synthetic_experts(static, 8, RANK)
    twin = TwinModel(copy.deepcopy(static), exclusive, kinds={})
    gates = torch.eye(8)[torch.arange(16) % 8]
    prompt, step = torch.randint(0, 32000, (16, 128)), torch.randint(0, 32000, (16, 1))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    peft: Any = get_peft_model(copy.deepcopy(static), settings, adapter_name="e000")
    for index in range(1, 8):
        peft.add_adapter(f"e{index:03d}", settings)
    peft.to(torch.bfloat16).eval()
    names = [f"e{index % 8:03d}" for index in range(16)]

    def cached(model: Any, **settings: Any) -> Callable[[], Any]:
        with torch.inference_mode():
            cache = model(input_ids=prompt, past_key_values=DynamicCache(config=config), **settings).past_key_values

        def run() -> Any:
            cache.crop(-1) if cache.get_seq_length() > 128 else None
            return model(input_ids=step, past_key_values=cache, **settings)

        return run

    with torch.inference_mode():
        context = twin._context(gates, 16, 128)
        twin.encode(gates, input_ids=prompt[:, :4])
        with twin.slot.use(context):
            ours = cached(twin.backbone)
    run_static, run_peft = cached(static), cached(peft, adapter_names=names)

    def run_ours() -> None:
        with twin.slot.use(context):
            ours()

    contestants = {"static": run_static, "twin, auto": run_ours, "PEFT, one adapter a row": run_peft}
    return summary("decode", turns(contestants, options.repeats, clock))


def main() -> None:
    """Run the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of a MiniLM (BERT) model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--cases", nargs="+", default=["single", "mixed", "soft", "decode"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    results = {}
    for case in options.cases:
        results[case] = (
            decode_case(options, clock) if case == "decode" else encoder_case(case, options.base, options, clock)
        )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    print(
        json.dumps(
            {
                "benchmark": "inference",
                "commit": commit.strip(),
                "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
                "threads": options.threads,
                "clock": options.clock,
                "repeats": options.repeats,
                "dtype": {"encoder": "float32", "decode": "bfloat16"},
                "rank": RANK,
                "seed": SEED,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
