"""How much work is the decomposition of one expert at rank 16, against a full SVD per matrix and mergekit-extract-lora?

Expected: at most a tenth of extract-lora's CPU seconds (user and system, whole commands, kernel's figures), and at most
1 % more residual energy than the exact truncation leaves. All decompose expert - base of every matrix but embedding and
output layer, which extract-lora stores whole. The full SVD is our program with `torch.linalg.svd` in the place of
`truncate`; its factors are the exact truncation that the others are measured against, before anything is timed in
ratios. Prints a table and one JSON line last.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.writer import save_tensors
from twinmerge.merging.executor import make_executor
from twinmerge.tensors.difference import task_vector
from twinmerge.tensors.low_rank import LowRank, truncate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench_merge import CACHE, MERGEKIT, measure, mergekit
from benchmarks.make_checkpoints import make

PROGRAMS = ("twinmerge", "svd", "extract-lora")
PEFT = "base_model.model."


def main() -> None:
    """Run the comparison and print it, or be one of the programs that it runs."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--size", default="120m")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--pairs", type=int, default=3, help="runs of each program, in turns")
    options.add_argument("--models", type=Path, default=CACHE / "bench", help="where checkpoints are, or are made")
    options.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    options.add_argument("--run", choices=("twinmerge", "svd"), help=argparse.SUPPRESS)
    options.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    models = make(chosen.models, chosen.size)
    if chosen.run:
        decompose_expert(models, chosen.run, chosen.rank, chosen.out)
        return
    runs: dict[str, list[dict[str, float]]] = {program: [] for program in chosen.programs}
    left: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as work:
        for _ in range(chosen.pairs):
            for program in chosen.programs:
                out = Path(work, program)
                shutil.rmtree(out, ignore_errors=True)
                runs[program].append(measure(_command(program, models, chosen.rank, out, chosen.models)))
                left[program] = residual_energy(models, out)
    rows: dict[str, dict[str, Any]] = {}
    for program, measured in runs.items():
        rows[program] = {key: statistics.median(run[key] for run in measured) for key in measured[0]}
        rows[program] |= {"cpu_runs": [run["cpu_s"] for run in measured], "residual_energy": left[program]}
        for other in ("svd", "extract-lora"):
            if other in runs and other != program:
                ratios = [a["cpu_s"] / b["cpu_s"] for a, b in zip(measured, runs[other], strict=True)]
                rows[program][f"cpu_of_{other}"] = statistics.median(ratios)
        if "svd" in left:
            rows[program]["residual_over_exact"] = left[program] / left["svd"]
        print(_line(program, rows[program]), flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(
        json.dumps(
            {
                "benchmark": "decompose",
                "size": chosen.size,
                "rank": chosen.rank,
                "pairs": chosen.pairs,
                "commit": commit.stdout.strip(),
                "versions": {"torch": torch.__version__, "mergekit": MERGEKIT[0]},
                "cores": len(os.sched_getaffinity(0)),
                "load": os.getloadavg()[0],
                "rows": rows,
            }
        )
    )


def decompose_expert(models: Path, how: str, rank: int, out: Path) -> None:
    """Decompose every chosen matrix of the first expert and write the pairs as a PEFT adapter names them."""
    base, expert = Checkpoint.open(models / "base"), Checkpoint.open(models / "expert0")
    tensors: dict[str, torch.Tensor] = {}
    task = _Truncate(base, expert, rank, truncate if how == "twinmerge" else full_svd)
    for name, factors in make_executor("threads").map(task, matrices(base)):
        stem = PEFT + name.removesuffix(".weight")
        tensors |= {f"{stem}.lora_A.weight": factors.down.bfloat16(), f"{stem}.lora_B.weight": factors.up.bfloat16()}
    out.mkdir()
    save_tensors(tensors, out / "adapter_model.safetensors")


@dataclass(frozen=True)
class _Truncate:
    base: Checkpoint
    expert: Checkpoint
    rank: int
    method: Callable[[torch.Tensor, int], LowRank]

    def __call__(self, name: str) -> LowRank:
        """The factors of one matrix."""
        return self.method(task_vector(self.base.read(name), self.expert.read(name)), self.rank)


def full_svd(difference: torch.Tensor, rank: int) -> LowRank:
    """What extract-lora does."""
    left, values, right = torch.linalg.svd(difference, full_matrices=False)
    return LowRank(left[:, :rank] * values[:rank], right[:rank])


def matrices(base: Checkpoint) -> list[str]:
    """The matrices that are decomposed."""
    return [n for n, spec in base.specs.items() if len(spec.shape) == 2 and "embed" not in n and "lm_head" not in n]


def residual_energy(models: Path, adapter: Path) -> float:
    """What the stored factors leave of all differences: sum of squared Frobenius norms, in float64."""
    base, expert = Checkpoint.open(models / "base"), Checkpoint.open(models / "expert0")
    stored = Checkpoint.open(adapter / "adapter_model.safetensors")
    total = 0.0
    for name in matrices(base):
        stem = PEFT + name.removesuffix(".weight")
        down, up = stored.read(f"{stem}.lora_A.weight").float(), stored.read(f"{stem}.lora_B.weight").float()
        left = task_vector(base.read(name), expert.read(name)) - up @ down
        total += float(torch.linalg.vector_norm(left, dtype=torch.float64)) ** 2
    return total


def _command(program: str, models: Path, rank: int, out: Path, home: Path) -> list[str]:
    if program == "extract-lora":
        kit = str(mergekit().with_name("mergekit-extract-lora"))
        places = ["--model", str(models / "expert0"), "--base-model", str(models / "base"), "--out-path", str(out)]
        return [kit, *places, "--max-rank", str(rank)]
    own = [sys.executable, str(Path(__file__).resolve()), "--run", program, "--rank", str(rank)]
    return [*own, "--size", models.name, "--models", str(home), "--out", str(out)]


def _line(program: str, row: dict[str, Any]) -> str:
    parts = [f"{program:13}", "{cpu_s:7.1f} CPU s {wall_s:7.1f} s {peak_mb:6.0f} MB".format(**row)]
    parts += [f"{row[key]:.3f}x {key.removeprefix('cpu_of_')}" for key in row if key.startswith("cpu_of_")]
    if "residual_over_exact" in row:
        parts.append(f"residual energy {row['residual_over_exact']:.5f} of the exact truncation's")
    return " | ".join(parts)


if __name__ == "__main__":
    main()
