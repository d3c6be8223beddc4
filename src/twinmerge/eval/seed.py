"""Knows one seed of a suite: rows, experts, the suite's router, and what contestants share, computed once."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from twinmerge.eval.suite import Suite
from twinmerge.eval.tasks import Task
from twinmerge.files.progress import Progress
from twinmerge.files.rows import Row
from twinmerge.hf.heads import load_head
from twinmerge.hf.inputs import ids_of, tokenized_batches
from twinmerge.hf.loading import backbone_from, load_backbone, load_tokenizer
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import open_plan, router_features, router_rows
from twinmerge.merging.method import Method
from twinmerge.routing.router import Router, Routing, fit_router
from twinmerge.runtime.precision import autocast, resolve
from twinmerge.twin.features import Layers
from twinmerge.twin.plan import Plan
from twinmerge.twin.recipe import ExclusiveSettings, RouterSettings
from twinmerge.twin.shared import merged_tensors


class SeedRun:
    """One seed of a suite: rows, experts, the suite's router, and what contestants share, computed once."""

    def __init__(self, suite: Suite, seed: int, progress: Progress) -> None:
        """Nothing is read before it is needed."""
        self.suite, self.seed, self.progress = suite, seed, progress
        self._features: dict[str, tuple[dict[str, Tensor], Tensor]] = {}
        self._ids: tuple[dict[str, Tensor], Tensor] | None = None

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """Tasks with their rows, in the gate's order."""
        return {name: self.suite.task(name, self.seed) for name in sorted(self.suite.tasks)}

    @cached_property
    def plan(self) -> Plan:
        """The suite's own recipe, opened."""
        return self.plan_for(self.suite.shared, ExclusiveSettings(rank=0))

    def plan_for(self, shared: Method, exclusive: ExclusiveSettings) -> Plan:
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
        """Rows of unseen tasks, at the first seed."""
        names = self.suite.unseen if self.seed == self.suite.seeds[0] else {}
        return {name: self.suite.unseen_task(name, self.seed) for name in names}

    def autocast(self) -> torch.autocast:
        """The precision of the suite, for forward passes."""
        return autocast(resolve(self.suite.precision))

    def model(self, backbone: Any, exclusive: dict[str, Any] | None = None, kinds: Any = None) -> TwinModel:
        """A backbone with every expert's head in front; exclusive parts are computed in its dtype."""
        parts = exclusive or {name: {} for name in self.tasks}
        return TwinModel(
            backbone,
            {name: {key: part.to(backbone.dtype) for key, part in of.items()} for name, of in parts.items()},
            kinds=kinds or {},
            heads=self.heads,
            tokenizer=load_tokenizer(self.plan.base.path),
            max_length=self.suite.max_length,
        )

    def merged(self, shared: Method) -> TwinModel:
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
            rows, others = self._router_rows, self._others
            with self.autocast():
                found = router_features(model, {**rows, "": others}, Layers("all"), self.progress)
            self._features[key] = ({name: found[name] for name in rows}, found[""])
        return self._features[key]

    @cached_property
    def _router_rows(self) -> dict[str, list[Row]]:
        count = self.suite.router.samples_per_expert
        return {name: part[:count] for name, part in router_rows(self.plan).items()}

    @cached_property
    def _others(self) -> list[Row]:
        """Test rows, then unseen rows."""
        return [row for _, row in self.test] + [row for parts in self.unseen.values() for p in parts for row in p]

    def ids(self, model: TwinModel) -> tuple[dict[str, Tensor], Tensor]:
        """Token ids of the rows of `features`."""
        if self._ids is None:
            rows = {name: ids_of(model, part) for name, part in self._router_rows.items()}
            self._ids = rows, ids_of(model, self._others)
        return self._ids

    @cached_property
    def suite_routing(self) -> tuple[Router, Routing]:
        """The suite's router and where it sends every test and unseen row."""
        return self.route(self.merged(self.suite.shared), self.suite.shared.model_dump_json(), self.suite.router)

    def route(self, model: TwinModel, key: str, settings: RouterSettings) -> tuple[Router, Routing]:
        """Fit a router on a shared expert's features and route every test and unseen row."""
        fitted, others = self.features(model, key)
        size = model.backbone.config.hidden_size
        layers = settings.features.layers
        chosen = None if layers is None else {n: slice_features(f, layers, size) for n, f in fitted.items()}
        ids, other_ids = self.ids(model) if settings.features.tokens else (None, None)
        router = fit_router(chosen, settings, seed=self.seed, ids=ids)

        def features(rows: Tensor | None) -> Tensor:
            return slice_features(others if rows is None else others[rows], layers or Layers("all"), size)

        return router, router.decide(other_ids, features)

    def answers(
        self, model: TwinModel, rows: Sequence[Row], gates: Tensor | None, heads: Sequence[str], stage: str
    ) -> list[str]:
        """The label that each row's head gives, in the order of the rows."""
        labels = [""] * len(rows)
        done = 0
        for chosen, inputs in tokenized_batches(model, rows):
            with self.autocast():
                outputs = model.encode_as_routed(None if gates is None else gates[chosen], **inputs)
                answered = model.answer(outputs, [heads[i] for i in chosen], **inputs)
            for index, logits in zip(chosen, answered, strict=True):
                labels[index] = self.heads[heads[index]].config.id2label[int(logits.argmax())]
            done += len(chosen)
            self.progress(stage, done, len(rows))
        return labels


def slice_features(features: Tensor, layers: Layers, size: int) -> Tensor:
    """Columns of features `all` (rows, (layers + 1) * size) that belong to some layers."""
    states = features.reshape(len(features), -1, size)
    return states[:, layers.among(states.shape[1])].flatten(1)
