"""Runs one contestant: from its specification to predictions, bytes, time and scores."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from twinmerge.eval.metrics import mask_misrouted
from twinmerge.eval.results import ContestantResult, Kind, Predictions, TaskPredictions
from twinmerge.eval.scores import normalized_interval, score_tasks
from twinmerge.eval.seed import ANY_ROUTER, SeedRun, Twin, inputs_of
from twinmerge.eval.suite import ContestantSpec, Task
from twinmerge.files.rows import Row
from twinmerge.hf.features import pool
from twinmerge.hf.inputs import tokenized_batches
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.predict import predict
from twinmerge.jobs.tune import NEXT_TO_NOTHING, choose_scaling
from twinmerge.merging.method import Method
from twinmerge.merging.per_task import PerTask
from twinmerge.routing.group_wise import group_gates
from twinmerge.twin.plan import Plan

_TIMED_ROWS, _TIMED_BATCH = 256, 32


@dataclass(frozen=True)
class Run:
    """What running a contestant gave; lists are by test row."""

    oracle: list[str]
    """The label that the head of its task gives."""
    bytes: dict[str, int]
    expert: list[str] | None = None
    """Whose head the router picked."""
    gate: Tensor | None = None
    """(row, expert), what was mixed."""
    unseen: dict[str, float] = field(default_factory=dict)
    milliseconds: float | None = None


class Contestant:
    """One contestant at one seed, whose answers are labels."""

    def __init__(self, at: SeedRun, name: str, spec: ContestantSpec) -> None:
        """Nothing is run yet."""
        self.at, self.name, self.spec = at, name, spec
        self.stage = f"{name} (seed {at.seed})"
        self.settings: dict[str, Any] = {"seed": at.seed, "precision": at.suite.precision}
        self.rows = [row for _, row in at.test]
        self.truth = [task for task, _ in at.test]

    def run(self) -> tuple[ContestantResult, Predictions]:
        """Run it on all test rows of the seed: its result, and its predictions for paired intervals."""
        kinds = {
            "experts": self._experts,
            "top1": self._top1,
            "static": self._static,
            "per_task": self._per_task,
            "twin": self._twin,
        }
        return self._result(kinds[self.spec.kind]())

    def _experts(self) -> Run:
        oracle = [label for name in self.at.tasks for label in self.at.expert_answers[name]]
        return Run(oracle, {"shared": expert_bytes(self.at.plan)})

    def _top1(self) -> Run:
        """The reference's router picks a full expert."""
        at, rows, truth = self.at, self.rows, self.truth
        model, chosen = at.reference.model, at.reference.expert[: len(rows)]
        oracle = [""] * len(rows)
        for name in at.tasks:
            members = [row for row, expert in enumerate(chosen) if expert == name]
            picked, heads = [rows[i] for i in members], [truth[i] for i in members]
            found = at.answers(model, picked, None, heads, self.stage, at.body(name, model.backbone.dtype))
            for row, label in zip(members, found, strict=True):
                oracle[row] = label
        nbytes = {"shared": expert_bytes(at.plan, base=True), "router": at.reference.bytes["router"]}
        return Run(oracle, nbytes, chosen)

    def _static(self) -> Run:
        """The shared expert of a twin without its exclusive parts; the reference's router picks the heads."""
        at, merged = self.at, self.at.build(self._chosen_shared(), NEXT_TO_NOTHING, ANY_ROUTER)
        heads = at.reference.expert[: len(self.rows)]
        oracle = at.answers(merged.model, self.rows, None, self.truth, self.stage)

        def answer(rows: Sequence[Row]) -> None:
            at.answers(merged.model, rows, None, self.truth[: len(rows)], None)

        return Run(
            oracle,
            {part: merged.bytes[part] for part in ("shared", "heads")} | {"router": at.reference.bytes["router"]},
            heads,
            unseen=self._unseen(merged.model, None),
            milliseconds=self._milliseconds(answer),
        )

    def _per_task(self) -> Run:
        """Each row under the weights that its task's name picks; routed, the reference's router in front picks it."""
        at, oracle = self.at, list[str]()
        heads = at.reference.expert[: len(self.rows)]
        method = cast(PerTask, self.spec.shared)
        for name, task in at.tasks.items():
            own = method.model_copy(update={"task": name})
            made = [own.model_copy(update={"threshold": one}) for one in self.spec.thresholds or ()] or [own]
            built = [at.build(one, NEXT_TO_NOTHING, ANY_ROUTER) for one in made]
            best = 0
            if len(built) > 1:
                scores = [self._validation_accuracy(one.model, task) for one in built]
                best = int(np.argmax(scores))
                self.settings[f"threshold.{name}"] = (self.spec.thresholds or [])[best]
            oracle += at.answers(built[best].model, task.test, None, [name] * len(task.test), f"{self.stage}: {name}")
            nbytes = {"heads": built[best].bytes["heads"], "router": at.reference.bytes["router"]}
        return Run(oracle, method.stored_bytes(at.plan.base.specs.values(), len(at.tasks)) | nbytes, heads)

    def _twin(self) -> Run:
        at, count = self.at, len(self.rows)
        twin = at.twin(
            self.spec.shared, self.spec.exclusive or NEXT_TO_NOTHING, self.spec.router, self.spec.router_split
        )
        oracle, milliseconds = list(twin.label[:count]), None
        if self.spec.groups:
            oracle = at.answers(twin.model, self.rows, self._grouped(twin), self.truth, self.stage)
        else:
            other = [row for row in range(count) if twin.expert[row] != self.truth[row]]
            rows, heads = [self.rows[i] for i in other], [self.truth[i] for i in other]
            for row, label in zip(
                other, at.answers(twin.model, rows, twin.gate[other], heads, self.stage), strict=True
            ):
                oracle[row] = label
            milliseconds = self._milliseconds(lambda rows: list(predict(twin.model, inputs_of(rows))))
        nbytes = {part: twin.bytes[part] for part in ("shared", "exclusive", "heads", "router")}
        unseen = self._unseen(twin.model, twin.gate[count:])
        return Run(oracle, nbytes, twin.expert[:count], twin.gate[:count], unseen, milliseconds)

    def _chosen_shared(self) -> Method:
        """The merge, its scaling the best on validation rows if the suite gives several (the first, if equal)."""
        if self.spec.scalings is None:
            return self.spec.shared

        def score(method: Method) -> float:
            model = self.at.build(method, NEXT_TO_NOTHING, ANY_ROUTER).model
            return float(np.mean([self._validation_accuracy(model, task) for task in self.at.tasks.values()]))

        tuned = choose_scaling(self.spec.shared, self.spec.scalings, score)
        self.settings["scaling"] = tuned.scaling
        return tuned.method

    def _validation_accuracy(self, model: TwinModel, task: Task) -> float:
        rows = task.validation[: self.at.suite.validation_rows]
        return accuracy(self.at.answers(model, rows, None, [task.name] * len(rows), f"{self.stage}: validation"), rows)

    def _grouped(self, twin: Twin) -> Tensor:
        """Group-wise: by row, the mean gate of its group (METHOD §5)."""
        gate, names = twin.gate[: len(self.rows)], list(self.at.tasks)
        chosen = torch.tensor([names.index(name) for name in twin.expert[: len(self.rows)]])
        group, gates = group_gates(gate, chosen, self.spec.groups or 1, seed=self.at.seed)
        self.settings["groups"] = len(gates)
        return gates[group]

    def _unseen(self, model: TwinModel, gate: Tensor | None) -> dict[str, float]:
        """Accuracy on tasks without an expert; `gate` holds their rows' gates, validation before test, task by task."""
        scores, start = {}, 0
        for name, (fit, test) in self.at.unseen.items():
            stop = start + len(fit) + len(test)
            span, start = None if gate is None else gate[start:stop], stop
            head = self.at.suite.unseen[name].head
            if head is not None:
                found = self.at.answers(model, test, span, [head] * len(test), f"{self.stage}: {name}")
            else:
                found = self._probe(model, fit, test, span)
            scores[name] = accuracy(found, test)
        return scores

    def _probe(self, model: TwinModel, fit: Sequence[Row], test: Sequence[Row], gate: Tensor | None) -> list[str]:
        """Labels by a logistic regression on the backbone's mean output, fitted on the task's validation rows."""
        from sklearn.linear_model import LogisticRegression

        rows = [*fit, *test]
        features = [torch.empty(0)] * len(rows)
        for chosen, inputs in tokenized_batches(model, rows):
            with self.at.autocast():
                states = model.encode(None if gate is None else gate[chosen], **inputs)[0]
            for index, values in zip(chosen, pool(states, inputs.get("attention_mask")), strict=True):
                features[index] = values
        pooled = torch.stack(features)
        regression = LogisticRegression(C=10.0, max_iter=1000)
        regression.fit(pooled[: len(fit)].numpy(), [row["label"] for row in fit])
        return [str(label) for label in regression.predict(pooled[len(fit) :].numpy())]

    def _milliseconds(self, answer: Callable[[Sequence[Row]], object]) -> float:
        """Wall milliseconds an input, from its text on: the median of mixed batches of 32."""
        picked = self.rows[:: max(1, len(self.rows) // _TIMED_ROWS)][:_TIMED_ROWS]
        parts = [picked[i : i + _TIMED_BATCH] for i in range(0, len(picked), _TIMED_BATCH)]
        times = []
        with self.at.autocast():
            answer(parts[0])
            for rows in parts:
                started = time.perf_counter()
                answer(rows)
                times.append((time.perf_counter() - started) / len(rows))
        return 1000 * float(np.median(times))

    def _result(self, run: Run) -> tuple[ContestantResult, Predictions]:
        at, names = self.at, list(self.at.tasks)
        nbytes = {"exclusive": 0, "heads": 0, "router": 0, **run.bytes}
        tasks, gate_mean, confusion, start = {}, {}, {}, 0
        for name, task in at.tasks.items():
            span = slice(start, start + len(task.test))
            start = span.stop
            answered = run.oracle[span]
            routed = None
            if at.suite.writes and self.spec.kind != "experts":
                routed = answered  # no head is picked: what the model writes is its answer
            if run.expert is not None:
                chosen = run.expert[span]
                routed = routed or mask_misrouted(answered, chosen, name)
                confusion[name] = {other: chosen.count(other) for other in names}
            if run.gate is not None:
                gate_mean[name] = dict(zip(names, run.gate[span].double().mean(dim=0).tolist(), strict=True))
            tasks[name] = TaskPredictions(
                metric=task.spec.metric,
                positive_label=task.spec.positive_label,
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
            ms_per_input=run.milliseconds,
            tasks=score_tasks(predictions),
            normalized_routed=None if routed is None else normalized_interval([predictions], "routed"),
            normalized_oracle_head=normalized_interval([predictions], "oracle_head"),
            gate_mean=gate_mean or None,
            confusion=confusion or None,
            unseen=run.unseen,
        )
        return result, predictions


def _kind(spec: ContestantSpec) -> Kind:
    if spec.kind == "experts":
        return "experts"
    if spec.kind in ("top1", "per_task") or (spec.kind == "twin" and spec.shared.method == "pretrained"):
        return "dynamic"
    if spec.kind == "static" and spec.shared.method == "pretrained":
        return "base"
    return "twin" if spec.kind == "twin" else "static"


def _flat(spec: ContestantSpec) -> dict[str, Any]:
    """A specification as flat settings: shared.method, exclusive.rank, ..."""
    flat: dict[str, Any] = {}
    for key, value in spec.model_dump(mode="json", exclude={"title", "seeds"}, exclude_none=True).items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": v for inner, v in value.items()}
        else:
            flat[key] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return flat


def weights_bytes(path: Path) -> int:
    """Bytes on disk of the weights of a model's folder, or of an adapter's file."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.safetensors"))


def expert_bytes(plan: Plan, *, base: bool = False) -> int:
    """Bytes on disk of all experts, and of the base where adapters need it or it is asked for."""
    paths = [expert.checkpoint.path for expert in plan.experts.values()]
    needed = base or any(path.is_file() for path in paths)
    return sum(map(weights_bytes, paths)) + (plan.base.nbytes if needed else 0)


def accuracy(found: Sequence[str], rows: Sequence[Row]) -> float:
    """Share of the rows whose label was found."""
    return float(np.mean([label == row["label"] for label, row in zip(found, rows, strict=True)]))
