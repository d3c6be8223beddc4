"""What does a twin of LoRA experts cost to build, beside the same experts given as whole models?

Expected: adapters are decomposed from their factors, without a matrix of the model's size, in a fraction of the time
and of the memory; both twins are the same, shared expert and products of factors, to 1e-5 of the largest entry where
every direction is kept.

Both builds run as users run them, whole command, in turns, under the default budget; CPU seconds (user and system),
wall seconds and peak memory are the kernel's figures for the child. Prints a table and one JSON line last.

    python -m benchmarks.bench_lora --size 120m --pairs 3
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.bench_merge import CACHE, EXPERTS, measure
from benchmarks.make_checkpoints import make
from twinmerge.twin.artifact import TwinArtifact

RANK, TARGETS = 16, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Run the comparison and print it."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--size", default="120m")
    options.add_argument("--pairs", type=int, default=3, help="builds of each kind, in turns")
    options.add_argument("--models", type=Path, default=CACHE / "bench", help="where checkpoints are, or are made")
    chosen = options.parse_args()
    models = prepare(chosen.models, chosen.size)
    with tempfile.TemporaryDirectory(dir=models) as work:
        largest = {kind: difference(models, Path(work), kind) for kind in ("shared", "exclusive")}
        runs: dict[str, list[dict[str, float]]] = {"adapter": [], "merged": []}
        for _ in range(chosen.pairs):
            for kind, measured in runs.items():
                measured.append(built(models, Path(work), kind, "{budget: 0.06}"))
    medians = {kind: {key: statistics.median(run[key] for run in own) for key in own[0]} for kind, own in runs.items()}
    for kind, figures in medians.items():
        print(f"{kind:8} | {{cpu_s:7.1f}} CPU s {{wall_s:7.1f}} s {{peak_mb:6.0f}} MB".format(**figures))
    ratios = {key: [a[key] / b[key] for a, b in zip(*runs.values(), strict=True)] for key in medians["merged"]}
    print(" | ".join(f"{key} {statistics.median(r):.3f} [{min(r):.3f}, {max(r):.3f}]" for key, r in ratios.items()))
    print(f"largest relative difference: shared {largest['shared']:.1e}, exclusive {largest['exclusive']:.1e}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    found = {
        "benchmark": "lora",
        "size": chosen.size,
        "experts": EXPERTS,
        "rank": RANK,
        "commit": commit.stdout.strip(),
    }
    machine = {"cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}
    print(json.dumps({**found, **machine, "medians": medians, "ratios": ratios, "differences": largest}))


def prepare(folder: Path, size: str) -> Path:
    """A float32 base, LoRA experts on it, and the same merged; gives their folder."""
    source, root = make(folder, size) / "base", folder / f"{size}-lora"
    if (root / "complete").exists():
        return root
    base = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for number in range(EXPERTS):
        model = LlamaForCausalLM.from_pretrained(root / "base")
        torch.manual_seed(number)
        settings = LoraConfig(r=RANK, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PEFT, about transformers
            adapted: Any = get_peft_model(model, settings)
            adapted.save_pretrained(root / f"adapter{number}")
            adapted.merge_and_unload().save_pretrained(root / f"merged{number}")
        tokenizer.save_pretrained(root / f"merged{number}")
    (root / "complete").touch()
    return root


def built(models: Path, work: Path, kind: str, exclusive: str) -> dict[str, float]:
    """One build into `work/KIND`, measured."""
    recipe = work / f"{kind}.yaml"
    experts = "".join(f"  e{number}: {{model: {models}/{kind}{number}}}\n" for number in range(EXPERTS))
    settings = f"shared: {{method: average}}\nexclusive: {exclusive}\nrouter: none\n"
    recipe.write_text(f"base: {models}/base\nexperts:\n{experts}{settings}", encoding="utf-8")
    shutil.rmtree(work / kind, ignore_errors=True)
    return measure([sys.executable, "-m", "twinmerge", "build", str(recipe), "--out", str(work / kind), "--no-check"])


def difference(models: Path, work: Path, part: str) -> float:
    """The largest difference of both twins, of the largest entry, where every direction is kept in float32."""
    for kind in ("adapter", "merged"):
        if not (work / kind).exists():
            built(models, work, kind, f"{{rank: {RANK * EXPERTS}, dtype: float32}}")
    first, second = (TwinArtifact.open(work / kind) for kind in ("adapter", "merged"))
    if part == "shared":
        return max(_apart(first.shared.read(name), second.shared.read(name)) for name in first.shared.specs)
    apart = 0.0
    for expert in first.expert_names:
        ours, theirs = first.exclusive(expert), second.exclusive(expert)
        for name in theirs.keys() | ours.keys():
            kept = [parts[name].dense() for parts in (ours, theirs) if name in parts]
            if len(kept) == 1:  # what no adapter trained is no part of theirs, and zero where whole models are compared
                kept.append(torch.zeros_like(kept[0]))
            apart = max(apart, _apart(*kept))
    return apart


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    largest = max(float(one.abs().max()), float(other.abs().max()))
    return float((one - other).abs().max()) / largest if largest else 0.0


if __name__ == "__main__":
    main()
