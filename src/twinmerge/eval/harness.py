"""Runs a suite: every contestant at every seed, resumable run by run, put together for the report."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from twinmerge.errors import DataError
from twinmerge.eval.ablation import router_ablation
from twinmerge.eval.contestant import expert_bytes
from twinmerge.eval.results import (
    Comparison,
    ContestantResult,
    Environment,
    Predictions,
    RouterResult,
    SuiteResult,
    read_predictions,
    write_predictions,
)
from twinmerge.eval.scores import compare, summarize
from twinmerge.eval.seed import SeedRun
from twinmerge.eval.suite import ContestantSpec, Suite
from twinmerge.eval.writer import run_contestant
from twinmerge.files.progress import Progress, silent
from twinmerge.jobs.build import open_plan, versions
from twinmerge.jobs.tune import NEXT_TO_NOTHING
from twinmerge.runtime.precision import resolve


def run_suite(
    suite: Suite,
    out: Path,
    *,
    seeds: Sequence[int] | None = None,
    contestants: Sequence[str] | None = None,
    progress: Progress = silent,
) -> SuiteResult:
    """Run every contestant at every seed; what is already in `out/runs` with the same settings is not run again.

    Args:
        suite: who and what.
        out: folder for results; `runs/` in it keeps one file a contestant and seed.
        seeds: only these; None is all of the suite.
        contestants: only these; None is all of the suite.
        progress: called with (stage, done, total).

    Returns:
        All results, ready for the report.

    Raises:
        InputError: whatever is wrong with names, rows, experts or a contestant's recipe, before any work.
    """
    names = list(contestants or suite.contestants)
    unknown = [name for name in names if name not in suite.contestants]
    if unknown:
        raise DataError(f"unknown contestant {unknown[0]!r}; the suite has {', '.join(suite.contestants)}")
    seeds = list(seeds or suite.seeds)
    suite = suite.model_copy(update={"precision": resolve(suite.precision)})
    ready = [SeedRun(suite, seed, progress) for seed in seeds]
    for at in ready:
        at.require_labels()
    plan = ready[0].plan
    for spec in (suite.contestants[name] for name in names):
        open_plan(suite.recipe(suite.method_of(spec), spec.exclusive or NEXT_TO_NOTHING, spec.router, seeds[0]))
    runs = out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    results: list[ContestantResult] = []
    predictions: list[Predictions] = []
    routers: list[RouterResult] = []
    while ready:  # what a finished seed keeps in memory is let go
        at = ready.pop(0)
        for name in names:
            spec = suite.contestants[name]
            if spec.seeds is not None and at.seed not in spec.seeds:
                continue
            result, answers = _run(runs, at, name, spec)
            results.append(result)
            predictions.append(answers)
        if suite.router_ablation and at.seed == suite.seeds[0]:
            routers = _routers(runs, at)
    order = {name: index for index, name in enumerate(names)}
    results.sort(key=lambda one: (order[one.name], one.seed))
    predictions.sort(key=lambda one: (order[one.contestant], one.seed))
    return SuiteResult(
        suite=suite.name,
        base=suite.base_title or plan.base.path.name,
        base_bytes=plan.base.nbytes,
        expert_bytes=expert_bytes(plan),
        tasks=sorted(suite.tasks),
        seeds=seeds,
        contestants=results,
        summaries=summarize(results, predictions),
        comparisons=_comparisons(results, predictions),
        routers=routers,
        environment=_environment(),
        sources=suite.sources,
    )


def _fingerprint(at: SeedRun, *specs: ContestantSpec) -> str:
    """Of versions and everything in a suite file that a run depends on, wherever the file lies; not of titles."""
    beside = {"base_title", "contestants", "folder", "root", "router_ablation", "seeds", "sources"}
    told = [json.dumps(versions()), at.suite.model_dump_json(exclude=beside), str(at.suite.root_of(at.seed))]
    told += [spec.model_dump_json(exclude={"title", "seeds"}) for spec in specs]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def _run(runs: Path, at: SeedRun, name: str, spec: ContestantSpec) -> tuple[ContestantResult, Predictions]:
    """A contestant's result and predictions: those of a finished run with the same settings, if there is one."""
    path, mark = runs / f"{name}.seed-{at.seed}.json", _fingerprint(at, spec)
    kept = _kept(path, mark)
    if kept is not None:
        result = ContestantResult.model_validate_json(json.dumps(kept))
        answers = read_predictions(runs / f"{name}.seed-{at.seed}.predictions.json.gz")
        return result.model_copy(update={"title": spec.title}), answers
    result, answers = run_contestant(at, name, spec)
    write_predictions(answers, runs)  # first, so that half a run is never taken for one
    _keep(path, mark, json.loads(result.model_dump_json()))
    return result, answers


def _routers(runs: Path, at: SeedRun) -> list[RouterResult]:
    """Routers on their own, kept like the runs."""
    path, mark = runs / f"routers.seed-{at.seed}.json", _fingerprint(at)
    kept = _kept(path, mark)
    if kept is None:
        kept = [json.loads(one.model_dump_json()) for one in router_ablation(at)]
        _keep(path, mark, kept)
    return [RouterResult.model_validate(one) for one in kept]


def _kept(path: Path, mark: str) -> Any:
    """What a finished run with the same settings left; None where there is none that can be read."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(stored, dict) and stored.get("fingerprint") == mark
    return stored.get("result") if same else None


def _keep(path: Path, mark: str, result: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"fingerprint": mark, "result": result}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _comparisons(results: Sequence[ContestantResult], predictions: Sequence[Predictions]) -> list[Comparison]:
    """Every twin against every static merge, both protocols, where they ran at the same seeds."""
    by_name: dict[str, list[Predictions]] = {}
    for one in predictions:
        by_name.setdefault(one.contestant, []).append(one)
    kinds = {one.name: one.kind for one in results}
    found = []
    for twin in (n for n in by_name if kinds[n] == "twin"):
        for static in (n for n in by_name if kinds[n] in ("static", "base")):
            if [p.seed for p in by_name[twin]] == [p.seed for p in by_name[static]]:
                found += [compare(by_name[twin], by_name[static], protocol) for protocol in ("routed", "oracle_head")]
    return found


def _environment() -> Environment:
    packages = ("twinmerge", "torch", "transformers", "safetensors", "numpy")
    return Environment(
        versions={"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        threads=torch.get_num_threads(),
        commit=_commit(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def _commit() -> str:
    """Of the working folder; a machine without git, or a folder without a history, loses no results."""
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
