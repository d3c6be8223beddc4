"""Knows how one contestant is run: from its specification to predictions, bytes, time and scores."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twinmerge.eval.metrics import mask_misrouted
from twinmerge.eval.results import (
    ContestantResult,
    Kind,
    Predictions,
    TaskPredictions,
)
from twinmerge.eval.scores import normalized_interval, score_tasks
from twinmerge.eval.seed import SeedRun
from twinmerge.eval.suite import ContestantSpec
from twinmerge.eval.tasks import Task
from twinmerge.files.rows import Row
from twinmerge.hf.inputs import tokenize, tokenized_batches
from twinmerge.hf.loading import backbone_from, load_backbone
from twinmerge.hf.model import TwinModel
from twinmerge.merging.method import Method
from twinmerge.routing.router import Router, Routing, group_gates
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.twin.decompose import write_weights
from twinmerge.twin.recipe import ExclusiveSettings

_TIMED_ROWS, _TIMED_BATCH = 256, 32


def run_contestant(at: SeedRun, name: str, spec: ContestantSpec) -> tuple[ContestantResult, Predictions]:
    """Run one contestant on all test rows of a seed.

    Args:
        at: the seed.
        name: the contestant's key.
        spec: what it is.

    Returns:
        Its result, and its predictions for paired intervals.
    """
    return _Contestant(at, name, spec).run()


@dataclass(frozen=True)
class _Run:
    """What running a contestant gave."""

    oracle: list[str]
    """The label of every test row, by the head of its task."""
    nbytes: dict[str, int]
    router: Router | None = None
    routing: Routing | None = None
    gate: Tensor | None = None
    unseen: dict[str, float] = field(default_factory=dict)
    milliseconds: float | None = None


class _Contestant:
    """One contestant at one seed."""

    def __init__(self, at: SeedRun, name: str, spec: ContestantSpec) -> None:
        self.at, self.name, self.spec = at, name, spec
        self.stage = f"{name} (seed {at.seed})"
        self.settings: dict[str, Any] = {"seed": at.seed, "precision": at.suite.precision}
        self.rows = [row for _, row in at.test]
        self.truth = [task for task, _ in at.test]

    def run(self) -> tuple[ContestantResult, Predictions]:
        kinds = {"experts": self._experts, "top1": self._top1, "static": self._static, "twin": self._twin}
        return self._result(kinds[self.spec.kind]())

    def _experts(self) -> _Run:
        at = self.at
        oracle = [label for name in at.tasks for label in at.expert_answers[name]]
        return _Run(oracle, {"shared": self._expert_bytes()})

    def _top1(self) -> _Run:
        router, routing = self.at.suite_routing
        oracle = self._by_routed_expert(routing, self.rows, self.truth)
        nbytes = {"shared": self._expert_bytes() + self.at.plan.base.nbytes}
        return _Run(oracle, nbytes, router, routing)

    def _static(self) -> _Run:
        """A static merge; the suite's router picks its heads."""
        model = self.at.merged(self._chosen_shared())
        router, routing = self.at.suite_routing
        oracle = self.at.answers(model, self.rows, None, self.truth, self.stage)
        unseen, milliseconds = self._unseen(model, None), self._milliseconds(model)
        return _Run(oracle, {"shared": self.at.plan.base.nbytes}, router, routing, None, unseen, milliseconds)

    def _twin(self) -> _Run:
        at = self.at
        with tempfile.TemporaryDirectory() as folder:
            artifact = self._write(Path(folder))
            backbone = load_backbone(artifact.path)
            parts = {name: artifact.exclusive(name) for name in artifact.expert_names}
            model = at.model(backbone, parts, artifact.kinds)
            nbytes = {"shared": at.plan.base.nbytes, "exclusive": _exclusive_bytes(artifact.path)}
        router, routing = self._twin_routing()
        model.router, gate = router, routing.gate
        if self.spec.groups:
            oracle, milliseconds = self._grouped(model, routing, self.spec.groups), None
        else:
            oracle = at.answers(model, self.rows, gate, self.truth, self.stage)
            milliseconds = self._milliseconds(model)
        unseen = self._unseen(model, gate[len(self.rows) :])
        return _Run(oracle, nbytes, router, routing, gate, unseen, milliseconds)

    def _chosen_shared(self) -> Method:
        """The merge, its scaling the best on validation rows if the suite gives several (the first, if equal)."""
        shared: Method = self.spec.shared
        if self.spec.scalings is None:
            return shared
        scores = {}
        for scaling in self.spec.scalings:
            model = self.at.merged(shared.model_copy(update={"scaling": scaling}))
            scores[scaling] = float(
                np.mean([self._validation_accuracy(model, task) for task in self.at.tasks.values()])
            )
        best = max(scores, key=scores.__getitem__)
        self.settings["scaling"] = best
        return shared.model_copy(update={"scaling": best})

    def _validation_accuracy(self, model: TwinModel, task: Task) -> float:
        rows = task.validation[: self.at.suite.validation_rows]
        found = self.at.answers(model, rows, None, [task.name] * len(rows), f"{self.stage}: validation")
        return float(np.mean([a == row["label"] for a, row in zip(found, rows, strict=True)]))

    def _write(self, folder: Path) -> TwinArtifact:
        """Decompose as `build` does, without a router."""
        plan = self.at.plan_for(self.spec.shared, self.spec.exclusive or ExclusiveSettings(rank=0))
        work, target = folder / "work", folder / "twin"
        work.mkdir()
        target.mkdir()
        report = write_weights(plan, target, work, self.at.progress)
        return TwinArtifact(target, {"experts": report.experts, "tensors": report.tensors, "files": {}})

    def _twin_routing(self) -> tuple[Router, Routing]:
        """The suite's router, unless the contestant has one of its own or another shared expert.

        A shared expert with `scaling: auto` differs from the suite's by little and takes the suite's router.
        """
        at, spec = self.at, self.spec
        same = spec.shared == at.suite.shared or spec.shared.automatic
        if spec.router is None and same:
            return at.suite_routing
        shared = at.suite.shared if same else spec.shared
        return at.route(at.merged(shared), shared.model_dump_json(), spec.router or at.suite.router)

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

    def _grouped(self, twin: TwinModel, routing: Routing, groups: int) -> list[str]:
        """Group-wise: one merged model per group of test rows (METHOD §5)."""
        rows, truth, count = self.rows, self.truth, len(self.rows)
        ours = Routing(routing.gate[:count], routing.router_logits[:count], routing.fallback[:count])
        group, gates = group_gates(ours, groups, seed=self.at.seed)
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
        for chosen, inputs in tokenized_batches(model, rows):
            with self.at.autocast():
                states = model.encode_as_routed(None if gate is None else gate[chosen], **inputs)[0]
            mask = inputs["attention_mask"].unsqueeze(-1)
            pooled[chosen] = (states * mask).sum(dim=1) / mask.sum(dim=1)
        regression = LogisticRegression(C=10.0, max_iter=1000)
        regression.fit(pooled[: len(fit)].numpy(), [row["label"] for row in fit])
        return [str(label) for label in regression.predict(pooled[len(fit) :].numpy())]

    def _milliseconds(self, model: TwinModel) -> float:
        """Wall milliseconds an input, mixed rows in batches of 32, routing included where there is a router."""
        step = max(1, len(self.rows) // _TIMED_ROWS)
        picked = self.rows[::step][:_TIMED_ROWS]
        parts = [tokenize(model, picked[i : i + _TIMED_BATCH]) for i in range(0, len(picked), _TIMED_BATCH)]

        def once(inputs: dict[str, Tensor]) -> None:
            with self.at.autocast():
                if model.router is not None:
                    model(**inputs)
                else:
                    heads = [model.expert_names[0]] * len(inputs["input_ids"])
                    model.answer(model.encode(None, **inputs), heads, **inputs)

        once(parts[0])
        times = []
        for inputs in parts:
            started = time.perf_counter()
            once(inputs)
            times.append((time.perf_counter() - started) / len(inputs["input_ids"]))
        return 1000 * float(np.median(times))

    def _expert_bytes(self) -> int:
        return sum(weights_bytes(expert.checkpoint.path) for expert in self.at.plan.experts.values())

    def _bytes(self, run: _Run) -> dict[str, int]:
        """All parts; a full expert holds its head."""
        heads = sum(p.nbytes for head in self.at.heads.values() for p in head.parameters())
        full = self.spec.kind in ("experts", "top1")
        parts = {"exclusive": 0, "heads": 0 if full else heads, "router": 0, **run.nbytes}
        return {**parts, "router": 0 if run.router is None else _router_bytes(run.router)}

    def _result(self, run: _Run) -> tuple[ContestantResult, Predictions]:
        at, names = self.at, list(self.at.tasks)
        tasks, gate_mean, confusion, start = {}, {}, {}, 0
        for name, task in at.tasks.items():
            span = slice(start, start + len(task.test))
            start = span.stop
            answered = run.oracle[span]
            routed = None
            if run.routing is not None:
                chosen = [names[i] for i in run.routing.expert[span].tolist()]
                routed = mask_misrouted(answered, chosen, name)
                confusion[name] = {other: chosen.count(other) for other in names}
            if run.gate is not None:
                gate_mean[name] = dict(zip(names, run.gate[span].double().mean(dim=0).tolist(), strict=True))
            tasks[name] = TaskPredictions(
                metric=task.metric,
                positive_label=task.positive_label,
                labels=[row["label"] for row in task.test],
                expert=at.expert_answers[name],
                oracle_head=answered,
                routed=routed,
            )
        nbytes = self._bytes(run)
        predictions = Predictions(contestant=self.name, seed=at.seed, tasks=tasks)
        result = ContestantResult(
            name=self.name,
            title=self.spec.title,
            kind=_kind(self.spec),
            seed=at.seed,
            settings={**_flat(self.spec), **self.settings},
            bytes=nbytes,
            exclusive_ratio=nbytes["exclusive"] / at.plan.base.nbytes,
            ms_per_input=run.milliseconds,
            tasks=score_tasks(predictions),
            normalized_routed=None if run.routing is None else normalized_interval([predictions], "routed"),
            normalized_oracle_head=normalized_interval([predictions], "oracle_head"),
            gate_mean=gate_mean or None,
            confusion=confusion or None,
            unseen=run.unseen,
        )
        return result, predictions


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


def weights_bytes(folder: Path) -> int:
    """Bytes on disk of a model folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _exclusive_bytes(twin: Path) -> int:
    files = [p for p in (twin / "experts").rglob("*") if p.is_file() and p.parent.name != "head"]
    return sum(path.stat().st_size for path in files)


def _router_bytes(router: Router) -> int:
    with tempfile.TemporaryDirectory() as folder:
        router.save(Path(folder) / "router")
        return sum(path.stat().st_size for path in (Path(folder) / "router").iterdir())
