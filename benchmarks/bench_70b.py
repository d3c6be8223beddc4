"""What does a 70B checkpoint take: to plan a twin and a merge of it, and to merge and decompose parts of it?

Expected: plans in seconds, as they read headers only; a merge of a real layer within the memory that was set.

    python benchmarks/bench_70b.py --work /tmp/70b [--memory 2GB] [--size 70b]

Base and two experts shaped as Llama-3-70B (80 layers, hidden 8192, intermediate 28672, 8 key-value heads, bf16) are
sparse files: all names and shapes, zeros as values, no room on the disk. A one-layer model of the same widths without
embeddings has random values; it is merged by the program as a user calls it, and its time extrapolated by bytes. Every
matrix of that layer of one expert is decomposed at rank 16 by a process of its own, as `build` does it, one at a time
on all cores' threads, and that time too is extrapolated by bytes.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from twinmerge.files.checkpoint import Checkpoint, TensorSpec
from twinmerge.files.writer import CheckpointWriter
from twinmerge.tensors.difference import task_vector
from twinmerge.tensors.low_rank import truncate

SIZES = {
    "70b": {"layers": 80, "hidden": 8192, "intermediate": 28672, "heads": 64, "vocabulary": 128256},
    "tiny": {"layers": 3, "hidden": 64, "intermediate": 160, "heads": 8, "vocabulary": 96},
}
BLOCK = 1 << 22


def shapes(layers: int, hidden: int, intermediate: int, heads: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama with 8 key-value heads."""
    key_value = hidden // heads * 8
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    found: dict[str, tuple[int, ...]] = {}
    if vocabulary:
        found |= {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    found |= {f"model.layers.{i}.{n}.weight": shape for i in range(layers) for n, shape in layer.items()}
    return found | {"model.norm.weight": (hidden,)}


def write(folder: Path, size: dict[str, int], noise: float | None = None) -> Path:
    """A checkpoint as sparse files; with noise, one of random values, fine-tunes differing by so much."""
    folder.mkdir(parents=True)
    specs = [TensorSpec(n, s, torch.bfloat16, folder, 0) for n, s in shapes(**size).items()]
    writer = CheckpointWriter.plan(specs, folder)
    for file, (head, nbytes) in writer.heads.items():
        with (folder / file).open("wb") as opened:
            opened.write(head)
            opened.truncate(nbytes)
    writer.finish()
    if noise is not None:
        block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
        block += noise * torch.randn(
            BLOCK, generator=torch.Generator().manual_seed(len(folder.name) + ord(folder.name[-1]))
        )
        stored = block.bfloat16()
        for spec in specs:
            for start in range(0, spec.numel, BLOCK):
                writer.write(spec.name, start, stored[: min(BLOCK, spec.numel - start)])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size["hidden"],
        "intermediate_size": size["intermediate"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": 8,
        "vocab_size": size["vocabulary"],
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def twin_recipe(work: Path) -> Path:
    """A twin of two experts, rank 16."""
    for name in "ab":
        (work / f"{name}.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    experts = "".join(f"  {name}: {{model: {name}, router_data: {name}.jsonl}}\n" for name in "ab")
    (work / "twin.yaml").write_text(f"base: base\nexperts:\n{experts}exclusive: {{rank: 16}}\n")
    return work / "twin.yaml"


def merge_recipe(work: Path, prefix: str = "") -> Path:
    """Task arithmetic of two experts."""
    path = work / f"{prefix}merge.yaml"
    path.write_text(f"base: {prefix}base\nexperts: {{a: {prefix}a, b: {prefix}b}}\n")
    return path


def decompose_layer(work: Path) -> dict[str, Any]:
    """Decompose every matrix of one layer of one expert; entries, and the share of energy that rank 16 leaves."""
    base, expert = Checkpoint.open(work / "layer-base"), Checkpoint.open(work / "layer-a")
    entries, left, whole = 0, 0.0, 0.0
    for name, spec in base.specs.items():
        if len(spec.shape) == 2:
            difference = task_vector(base.read(name), expert.read(name))
            kept = truncate(difference, 16)
            energy = float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
            entries, whole = entries + spec.numel, whole + energy
            left += energy - float(torch.linalg.vector_norm(kept.up, dtype=torch.float64)) ** 2
    return {"entries": entries, "energy_left": left / whole}


def run(*arguments: str) -> tuple[float, float, dict[str, Any]]:
    """Seconds, peak memory in MB and the JSON of a command of the program in its own process."""
    return measured("-m", "twinmerge", *arguments)


def measured(*arguments: str) -> tuple[float, float, dict[str, Any]]:
    """The same of whatever Python is called with."""
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True) as process:
        output = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss / 1e3, json.loads(output)


def main() -> None:
    """Plan, merge one layer, extrapolate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a new folder")
    parser.add_argument("--size", choices=SIZES, default="70b")
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--twin-memory", default="20GB", help="for the plan of the twin: its matrices are held whole")
    parser.add_argument("--decompose", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decompose:
        print(json.dumps(decompose_layer(options.work)))
        return
    size = SIZES[options.size]
    for name in ("base", "a", "b"):
        write(options.work / name, size)
        write(options.work / f"layer-{name}", {**size, "layers": 1, "vocabulary": 0}, 0.0 if name == "base" else 0.02)
    whole = Checkpoint.open(options.work / "base").nbytes
    found: dict[str, Any] = {"size": options.size, "bytes": whole, "torch": torch.__version__}
    for name, recipe, memory in (
        ("plan twin", twin_recipe(options.work), options.twin_memory),
        ("plan merge", merge_recipe(options.work), options.memory),
    ):
        seconds, megabytes, plan = run("plan", str(recipe), "--memory", memory, "--json")
        found[name] = {"s": seconds, "peak_mb": megabytes}
        print(f"{name}: {seconds:.1f} s, {megabytes:,.0f} MB, {plan['tensors']} tensors")
    recipe = merge_recipe(options.work, "layer-")
    out = options.work / "layer-out"
    seconds, megabytes, manifest = run("merge", str(recipe), "--out", str(out), "--memory", options.memory, "--json")
    part = Checkpoint.open(out).nbytes
    found["merge of one layer"] = {
        "s": seconds,
        "peak_mb": megabytes,
        "bytes": part,
        "tensors": manifest["tensors"],
        "extrapolated_s": seconds * whole / part,
    }
    print(
        f"one layer of {part / 1e9:.2f} GB merged in {seconds:.1f} s with {megabytes:,.0f} MB; the whole model, "
        f"{whole / 1e9:.1f} GB, at the same bytes a second: {seconds * whole / part / 60:,.0f} min"
    )
    seconds, megabytes, layer = measured(str(Path(__file__).resolve()), "--work", str(options.work), "--decompose")
    extrapolated = seconds * whole / (2 * layer["entries"])
    found["decomposition of one layer"] = {
        "s": seconds,
        "peak_mb": megabytes,
        **layer,
        "extrapolated_s": extrapolated,
    }
    print(
        f"one layer of one expert, {layer['entries'] / 1e6:.0f} million entries, decomposed at rank 16 in "
        f"{seconds:.1f} s with {megabytes:,.0f} MB; the whole expert at the same rate: {extrapolated / 60:,.0f} min"
    )
    found["own_peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps(found))


if __name__ == "__main__":
    main()
