"""Knows how a suite is run: every contestant on the same rows, scored, timed and weighed; resumable run by run."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twinmerge.errors import DataError
from twinmerge.eval.ablation import router_ablation
from twinmerge.eval.metrics import mask_misrouted
from twinmerge.eval.results import (
    Comparison,
    ContestantResult,
    Environment,
    Kind,
    Predictions,
    RouterResult,
    SuiteResult,
    TaskPredictions,
    compare,
    normalized_interval,
    read_predictions,
    score_tasks,
    summarize,
    write_predictions,
)
from twinmerge.eval.suite import ContestantSpec, Suite
from twinmerge.eval.tasks import Task
from twinmerge.merging.methods import SharedParams
from twinmerge.runtime.build import open_plan, router_features, router_rows
from twinmerge.runtime.model import TwinModel, backbone_from, load_backbone, load_head, load_tokenizer
from twinmerge.runtime.predict import batches, tokenize
from twinmerge.runtime.rows import Row
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.twin.plan import Plan
from twinmerge.twin.recipe import ExclusiveSettings, RouterSettings
from twinmerge.twin.router import Router, Routing, fit_router, group_gates
from twinmerge.twin.weights import Progress, merged_tensors, silent, write_weights

BATCH = 64
_TIMED_ROWS, _TIMED_BATCH = 256, 32


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
        DataError: if a name in `contestants` is unknown, or rows cannot be read.
    """
    names = list(contestants or suite.contestants)
    unknown = [name for name in names if name not in suite.contestants]
    if unknown:
        raise DataError(f"unknown contestant {unknown[0]!r}; the suite has {', '.join(suite.contestants)}")
    runs = out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    seeds = list(seeds or suite.seeds)
    results: list[ContestantResult] = []
    predictions: list[Predictions] = []
    routers: list[RouterResult] = []
    for seed in seeds:
        at = SeedRun(suite, seed, progress)
        for name in names:
            spec = suite.contestants[name]
            if spec.seeds is not None and seed not in spec.seeds:
                continue
            result, answers = _resume(runs, name, seed, spec) or _store(runs, *at.run(name, spec), spec)
            results.append(result)
            predictions.append(answers)
        if suite.router_ablation and seed == suite.seeds[0]:
            routers = _router_table(runs, at)
    order = {name: index for index, name in enumerate(names)}
    results.sort(key=lambda one: (order[one.name], one.seed))
    predictions.sort(key=lambda one: (order[one.contestant], one.seed))
    return _assemble(suite, seeds, results, predictions, routers)


class SeedRun:
    """One seed of a suite: rows, experts, the suite's router, and what contestants share, computed once."""

    def __init__(self, suite: Suite, seed: int, progress: Progress) -> None:
        """Nothing is read before it is needed."""
        self.suite, self.seed, self.progress = suite, seed, progress
        self._features: dict[str, tuple[dict[str, Tensor], Tensor]] = {}

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """Tasks with their rows, in the gate's order."""
        return {name: self.suite.task(name, self.seed) for name in sorted(self.suite.tasks)}

    @cached_property
    def plan(self) -> Plan:
        """The suite's own recipe, opened."""
        return self.plan_for(self.suite.shared, ExclusiveSettings(rank=0))

    def plan_for(self, shared: SharedParams, exclusive: ExclusiveSettings) -> Plan:
        """A contestant's recipe, opened."""
        return open_plan(self.suite.recipe(shared, exclusive, None, self.seed))

    @cached_property
    def heads(self) -> dict[str, Any]:
        """Every expert's head."""
        return {n: load_head(self.plan.experts[n].config, self.plan.experts[n].read_head()) for n in self.tasks}

    @cached_property
    def test(self) -> list[tuple[str, Row]]:
        """All test rows with their task."""
        return [(name, row) for name, task in self.tasks.items() for row in task.test]

    @cached_property
    def unseen(self) -> dict[str, tuple[list[Row], list[Row]]]:
        """Rows of unseen tasks."""
        return {name: self.suite.unseen_task(name, self.seed) for name in self.suite.unseen}

    def model(self, backbone: Any, exclusive: dict[str, Any] | None = None, kinds: Any = None) -> TwinModel:
        """A backbone with every expert's head in front."""
        return TwinModel(
            backbone,
            exclusive or {name: {} for name in self.tasks},
            kinds=kinds or {},
            heads=self.heads,
            tokenizer=load_tokenizer(self.plan.base.path),
            max_length=self.suite.max_length,
        )

    def merged(self, shared: SharedParams) -> TwinModel:
        """A static merge."""
        plan = self.plan_for(shared, ExclusiveSettings(rank=0))
        state = {task.name: tensor for task, tensor in merged_tensors(plan, self.progress)}
        return self.model(backbone_from(plan.base.path, state))

    @cached_property
    def expert_answers(self) -> dict[str, list[str]]:
        """Each expert on its own test rows."""
        answers = {}
        for name, task in self.tasks.items():
            model = self.model(load_backbone(self.plan.experts[name].checkpoint.path, self.plan.base.path))
            answers[name] = self.answers(model, task.test, None, [name] * len(task.test), f"expert {name}")
        return answers

    def features(self, model: TwinModel, key: str) -> tuple[dict[str, Tensor], Tensor]:
        """Features `all` of a shared expert, once a key: router rows by expert, and test and unseen rows."""
        if key not in self._features:
            rows: dict[str, Sequence[Row]] = dict(router_rows(self.plan))
            rows = {name: part[: self.suite.router.samples_per_expert] for name, part in rows.items()}
            others = [row for _, row in self.test] + [row for parts in self.unseen.values() for p in parts for row in p]
            found = router_features(model, {**rows, "": others}, "all", self.progress)
            self._features[key] = ({name: found[name] for name in rows}, found[""])
        return self._features[key]

    @cached_property
    def suite_routing(self) -> tuple[Router, Routing]:
        """The suite's router and where it sends every test and unseen row."""
        return self.route(self.merged(self.suite.shared), self.suite.shared.model_dump_json(), self.suite.router)

    def route(self, model: TwinModel, key: str, settings: RouterSettings) -> tuple[Router, Routing]:
        """Fit a router on a shared expert's features and route every test and unseen row."""
        fitted, others = self.features(model, key)
        size = model.backbone.config.hidden_size
        router = fit_router(
            {n: slice_features(f, settings.features, size) for n, f in fitted.items()}, settings, seed=self.seed
        )
        return router, router(slice_features(others, settings.features, size))

    def answers(
        self, model: TwinModel, rows: Sequence[Row], gates: Tensor | None, heads: Sequence[str], stage: str
    ) -> list[str]:
        """The label that each row's head gives, in the order of the rows."""
        labels = [""] * len(rows)
        done = 0
        for chosen in batches(rows, BATCH):
            inputs = tokenize(model, [rows[i] for i in chosen])
            outputs = model.encode(None if gates is None else gates[chosen], **inputs)
            for index, logits in zip(chosen, model.answer(outputs, [heads[i] for i in chosen], **inputs), strict=True):
                labels[index] = self.heads[heads[index]].config.id2label[int(logits.argmax())]
            done += len(chosen)
            self.progress(stage, done, len(rows))
        return labels

    def run(self, name: str, spec: ContestantSpec) -> tuple[ContestantResult, Predictions]:
        """Run one contestant on all test rows."""
        return _Contestant(self, name, spec).run()


class _Contestant:
    """One contestant at one seed, from its specification to its result."""

    def __init__(self, at: SeedRun, name: str, spec: ContestantSpec) -> None:
        self.at, self.name, self.spec = at, name, spec
        self.stage = f"{name} (seed {at.seed})"
        self.settings: dict[str, Any] = {"seed": at.seed}

    def run(self) -> tuple[ContestantResult, Predictions]:
        at, spec = self.at, self.spec
        rows = [row for _, row in at.test]
        truth = [task for task, _ in at.test]
        base = at.plan.base.nbytes
        router, routing, gate = None, None, None
        nbytes = {"shared": base, "exclusive": 0, "heads": self._head_bytes(), "router": 0}
        unseen: dict[str, float] = {}
        milliseconds = None
        if spec.kind == "experts":
            oracle = [label for name in at.tasks for label in at.expert_answers[name]]
            nbytes["shared"] = sum(_folder_bytes(e.checkpoint.path) for e in at.plan.experts.values())
        elif spec.kind == "top1":
            router, routing = at.suite_routing
            oracle = self._by_routed_expert(routing, rows, truth)
            nbytes["shared"] = sum(_folder_bytes(e.checkpoint.path) for e in at.plan.experts.values()) + base
        elif spec.kind == "static":
            model = self._static()
            router, routing = at.suite_routing
            oracle = at.answers(model, rows, None, truth, self.stage)
            unseen = self._unseen(model, None)
            milliseconds = _milliseconds(model, rows)
        else:
            with tempfile.TemporaryDirectory() as folder:
                artifact = self._write(Path(folder))
                model = at.model(
                    load_backbone(artifact.path),
                    {n: artifact.exclusive(n) for n in artifact.expert_names},
                    artifact.kinds,
                )
                nbytes["exclusive"] = _exclusive_bytes(artifact.path)
            router, routing = self._twin_routing()
            model.router = router
            gate = routing.gate
            oracle = (
                self._grouped(model, routing, rows, truth)
                if spec.groups
                else at.answers(model, rows, gate, truth, self.stage)
            )
            unseen = self._unseen(model, gate[len(rows) :])
            milliseconds = None if spec.groups else _milliseconds(model, rows)
        if router is not None:
            nbytes["router"] = _router_bytes(router)
        return self._result(oracle, routing, gate, nbytes, unseen, milliseconds)

    def _static(self) -> TwinModel:
        """The static merge, its scaling chosen on validation rows if the suite gives several."""
        at, spec = self.at, self.spec
        if spec.scalings is None:
            return at.merged(spec.shared)
        best = (-1.0, spec.scalings[0])
        for scaling in spec.scalings:
            model = at.merged(spec.shared.model_copy(update={"scaling": scaling}))
            score = float(np.mean([self._validation_accuracy(model, task) for task in at.tasks.values()]))
            best = max(best, (score, -scaling), key=lambda pair: pair[0]) if best[0] >= 0 else (score, -scaling)
        self.settings["scaling"] = -best[1]
        return at.merged(spec.shared.model_copy(update={"scaling": -best[1]}))

    def _validation_accuracy(self, model: TwinModel, task: Task) -> float:
        rows = task.validation[: self.at.suite.validation_rows]
        found = self.at.answers(model, rows, None, [task.name] * len(rows), f"{self.stage}: validation")
        return float(np.mean([a == row["label"] for a, row in zip(found, rows, strict=True)]))

    def _write(self, folder: Path) -> TwinArtifact:
        """Decompose as `build` does, without a router."""
        assert self.spec.exclusive is not None
        plan = self.at.plan_for(self.spec.shared, self.spec.exclusive)
        work, target = folder / "work", folder / "twin"
        work.mkdir()
        target.mkdir()
        report = write_weights(plan, target, work, self.at.progress)
        return TwinArtifact(target, {"experts": report.experts, "tensors": report.tensors, "files": {}})

    def _twin_routing(self) -> tuple[Router, Routing]:
        """The suite's router, unless the contestant has one of its own or another shared expert."""
        at, spec = self.at, self.spec
        if spec.router is None and spec.shared == at.suite.shared:
            return at.suite_routing
        key = spec.shared.model_dump_json()
        if getattr(spec.shared, "scaling", None) == "auto":
            return at.suite_routing
        return at.route(at.merged(spec.shared), key, spec.router or at.suite.router)

    def _by_routed_expert(self, routing: Routing, rows: Sequence[Row], truth: Sequence[str]) -> list[str]:
        """Every row by the full weights of its routed expert, and the head of its task."""
        at, names = self.at, list(self.at.tasks)
        chosen = routing.expert[: len(rows)].tolist()
        labels = [""] * len(rows)
        for index, name in enumerate(names):
            members = [row for row in range(len(rows)) if chosen[row] == index]
            model = at.model(load_backbone(at.plan.experts[name].checkpoint.path, at.plan.base.path))
            found = at.answers(model, [rows[i] for i in members], None, [truth[i] for i in members], self.stage)
            for row, label in zip(members, found, strict=True):
                labels[row] = label
        return labels

    def _grouped(self, twin: TwinModel, routing: Routing, rows: Sequence[Row], truth: Sequence[str]) -> list[str]:
        """Group-wise: one merged model per group of test rows (METHOD §5)."""
        count = len(rows)
        ours = Routing(routing.gate[:count], routing.router_logits[:count], routing.fallback[:count])
        group, gates = group_gates(ours, self.spec.groups or 1, seed=self.at.seed)
        labels = [""] * count
        for index, gate in enumerate(gates):
            members = (group == index).nonzero()[:, 0].tolist()
            model = self.at.model(backbone_from(self.at.plan.base.path, twin.state_for(gate)))
            found = self.at.answers(model, [rows[i] for i in members], None, [truth[i] for i in members], self.stage)
            for row, label in zip(members, found, strict=True):
                labels[row] = label
        self.settings["groups"] = len(gates)
        return labels

    def _unseen(self, model: TwinModel, gate: Tensor | None) -> dict[str, float]:
        """Accuracy on tasks without an expert; `gate` holds their rows' gates, validation before test, task by task."""
        scores, start = {}, 0
        for name, (fit, test) in self.at.unseen.items():
            span = None if gate is None else gate[start : start + len(fit) + len(test)]
            start += len(fit) + len(test)
            head = self.at.suite.unseen[name].head
            if head is not None:
                found = self.at.answers(model, test, span, [head] * len(test), f"{self.stage}: {name}")
            else:
                found = self._probe(model, fit, test, span)
            scores[name] = float(np.mean([a == row["label"] for a, row in zip(found, test, strict=True)]))
        return scores

    def _probe(self, model: TwinModel, fit: Sequence[Row], test: Sequence[Row], gate: Tensor | None) -> list[str]:
        """Labels by a logistic regression on the backbone's mean output, fitted on the task's validation rows."""
        from sklearn.linear_model import LogisticRegression

        rows = [*fit, *test]
        pooled = torch.zeros(len(rows), model.backbone.config.hidden_size)
        for chosen in batches(rows, BATCH):
            inputs = tokenize(model, [rows[i] for i in chosen])
            states = model.encode(None if gate is None else gate[chosen], **inputs)[0]
            mask = inputs["attention_mask"].unsqueeze(-1)
            pooled[chosen] = (states * mask).sum(dim=1) / mask.sum(dim=1)
        regression = LogisticRegression(C=10.0, max_iter=1000)
        regression.fit(pooled[: len(fit)].numpy(), [row["label"] for row in fit])
        return [str(label) for label in regression.predict(pooled[len(fit) :].numpy())]

    def _head_bytes(self) -> int:
        return sum(p.nbytes for head in self.at.heads.values() for p in head.parameters())

    def _result(
        self,
        oracle: Sequence[str],
        routing: Routing | None,
        gate: Tensor | None,
        nbytes: dict[str, int],
        unseen: dict[str, float],
        milliseconds: float | None,
    ) -> tuple[ContestantResult, Predictions]:
        at, names = self.at, list(self.at.tasks)
        tasks, gate_mean, confusion, start = {}, {}, {}, 0
        for name, task in at.tasks.items():
            span = slice(start, start + len(task.test))
            start = span.stop
            answered = list(oracle[span])
            routed = None
            if routing is not None:
                chosen = [names[i] for i in routing.expert[span].tolist()]
                routed = mask_misrouted(answered, chosen, name)
                confusion[name] = {other: chosen.count(other) for other in names}
            if gate is not None:
                gate_mean[name] = dict(zip(names, gate[span].double().mean(dim=0).tolist(), strict=True))
            tasks[name] = TaskPredictions(
                metric=task.metric,
                positive_label=task.positive_label,
                labels=[row["label"] for row in task.test],
                expert=at.expert_answers[name],
                oracle_head=answered,
                routed=routed,
            )
        predictions = Predictions(contestant=self.name, seed=at.seed, tasks=tasks)
        result = ContestantResult(
            name=self.name,
            title=self.spec.title,
            kind=_kind(self.spec),
            seed=at.seed,
            settings={**_flat(self.spec), **self.settings},
            bytes=nbytes,
            exclusive_ratio=nbytes["exclusive"] / at.plan.base.nbytes,
            ms_per_input=milliseconds,
            tasks=score_tasks(predictions),
            normalized_routed=None if routing is None else normalized_interval([predictions], "routed"),
            normalized_oracle_head=normalized_interval([predictions], "oracle_head"),
            gate_mean=gate_mean or None,
            confusion=confusion or None,
            unseen=unseen,
        )
        return result, predictions


def slice_features(features: Tensor, spec: str, size: int) -> Tensor:
    """Columns of features `all` (rows, (layers + 1) * size) that another specification asks for."""
    count = features.shape[1] // size
    if spec == "all":
        return features
    layers = (
        [count - 1]
        if spec == "last"
        else [0]
        if spec == "embeddings"
        else json.loads(f"[{spec.split(':')[1].strip('[]')}]")
    )
    return torch.cat([features[:, layer * size : (layer + 1) * size] for layer in layers], dim=1)


def _milliseconds(model: TwinModel, rows: Sequence[Row]) -> float:
    """Wall milliseconds an input, mixed rows in batches of 32, routing included where there is a router."""
    step = max(1, len(rows) // _TIMED_ROWS)
    picked = rows[::step][:_TIMED_ROWS]
    parts = [tokenize(model, picked[i : i + _TIMED_BATCH]) for i in range(0, len(picked), _TIMED_BATCH)]

    def once(inputs: dict[str, Tensor]) -> None:
        if model.router is not None:
            model(**inputs)
        else:
            model.answer(model.encode(None, **inputs), [model.expert_names[0]] * len(inputs["input_ids"]), **inputs)

    once(parts[0])
    times = []
    for inputs in parts:
        started = time.perf_counter()
        once(inputs)
        times.append((time.perf_counter() - started) / len(inputs["input_ids"]))
    return 1000 * float(np.median(times))


def _kind(spec: ContestantSpec) -> Kind:
    if spec.kind == "experts":
        return "experts"
    if spec.kind == "top1" or (spec.kind == "twin" and spec.shared.method == "pretrained"):
        return "dynamic"
    if spec.kind == "static" and spec.shared.method == "pretrained":
        return "base"
    return "static" if spec.kind == "static" else "twin"


def _flat(spec: ContestantSpec) -> dict[str, Any]:
    """A specification as flat settings: shared.method, exclusive.rank, ..."""
    flat: dict[str, Any] = {}
    for key, value in spec.model_dump(mode="json", exclude={"title", "seeds"}, exclude_none=True).items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": v for inner, v in value.items()}
        else:
            flat[key] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return flat


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _exclusive_bytes(twin: Path) -> int:
    files = [p for p in (twin / "experts").rglob("*") if p.is_file() and p.parent.name != "head"]
    return sum(path.stat().st_size for path in files)


def _router_bytes(router: Router) -> int:
    with tempfile.TemporaryDirectory() as folder:
        router.save(Path(folder) / "router")
        return sum(path.stat().st_size for path in (Path(folder) / "router").iterdir())


def _fingerprint(spec: ContestantSpec) -> str:
    return hashlib.sha256(spec.model_dump_json(exclude={"title", "seeds"}).encode()).hexdigest()[:16]


def _resume(runs: Path, name: str, seed: int, spec: ContestantSpec) -> tuple[ContestantResult, Predictions] | None:
    """A finished run with the same settings."""
    path = runs / f"{name}.seed-{seed}.json"
    if not path.exists():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored["fingerprint"] != _fingerprint(spec):
        return None
    result = ContestantResult.model_validate_json(json.dumps(stored["result"]))
    answers = read_predictions(runs / f"{name}.seed-{seed}.predictions.json.gz")
    return result.model_copy(update={"title": spec.title}), answers


def _store(
    runs: Path, result: ContestantResult, answers: Predictions, spec: ContestantSpec
) -> tuple[ContestantResult, Predictions]:
    """Keep a finished run; the JSON last, so that half a run is never resumed."""
    write_predictions(answers, runs)
    path = runs / f"{result.name}.seed-{result.seed}.json"
    temporary = path.with_suffix(".tmp")
    content = {"fingerprint": _fingerprint(spec), "result": json.loads(result.model_dump_json())}
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return result, answers


def _router_table(runs: Path, at: SeedRun) -> list[RouterResult]:
    """Router ablations of the first seed, kept like the runs."""
    path = runs / f"routers.seed-{at.seed}.json"
    if not path.exists():
        started = time.monotonic()
        model = at.merged(at.suite.shared)
        fitted, others = at.features(model, at.suite.shared.model_dump_json())
        labels = torch.tensor([list(at.tasks).index(task) for task, _ in at.test])
        size, seconds = model.backbone.config.hidden_size, time.monotonic() - started

        def features(spec: str) -> tuple[dict[str, Tensor], Tensor]:
            test = slice_features(others[: len(labels)], spec, size)
            return {n: slice_features(f, spec, size) for n, f in fitted.items()}, test

        layers = others.shape[1] // size - 1
        found = router_ablation(features, labels, layers, at.suite.router, at.seed, seconds, at.progress)
        path.write_text(json.dumps([json.loads(one.model_dump_json()) for one in found], indent=1), encoding="utf-8")
    return [RouterResult.model_validate(one) for one in json.loads(path.read_text(encoding="utf-8"))]


def _assemble(
    suite: Suite,
    seeds: Sequence[int],
    results: list[ContestantResult],
    predictions: list[Predictions],
    routers: list[RouterResult],
) -> SuiteResult:
    plan = SeedRun(suite, seeds[0], silent).plan
    return SuiteResult(
        suite=suite.name,
        base=suite.base_title or plan.base.path.name,
        base_bytes=plan.base.nbytes,
        expert_bytes=sum(_folder_bytes(expert.checkpoint.path) for expert in plan.experts.values()),
        tasks=sorted(suite.tasks),
        seeds=list(seeds),
        contestants=results,
        summaries=summarize(results, predictions),
        comparisons=_comparisons(results, predictions),
        routers=routers,
        environment=_environment(),
        sources=suite.sources,
    )


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
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    packages = ("twinmerge", "torch", "transformers", "safetensors", "numpy")
    return Environment(
        versions={"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        threads=torch.get_num_threads(),
        commit=commit.stdout.strip() or "unknown",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
