"""One seed of a suite: its rows, its experts, its twins as a user builds and asks them, and what contestants share."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import DataError, MismatchError
from twinmerge.eval.suite import Suite, Task
from twinmerge.files.progress import Progress
from twinmerge.files.rows import INPUTS, Row
from twinmerge.hf.answers import CONTINUATION, LABEL, Answer, label_of
from twinmerge.hf.batches import DEFAULTS
from twinmerge.hf.inputs import batches_of, encode, pad, tokenized_batches
from twinmerge.hf.loading import backbone_from, load_backbone
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import build, open_plan
from twinmerge.jobs.predict import predict
from twinmerge.jobs.preflight import checked
from twinmerge.jobs.tune import NEXT_TO_NOTHING
from twinmerge.merging.method import Method
from twinmerge.runtime.precision import autocast, resolve
from twinmerge.twin.features import Features
from twinmerge.twin.manifest import Manifest
from twinmerge.twin.plan import Plan
from twinmerge.twin.recipe import ExclusiveSettings, RouterSettings

ANY_ROUTER = RouterSettings(method="centroid", features=Features.parse("embeddings"), samples_per_expert=2)
"""Of a twin whose router nobody asks: the cheapest to fit."""


@dataclass(frozen=True)
class Built:
    """A twin as a user has it: the built folder, loaded, its manifest, and its bytes by part."""

    model: TwinModel
    manifest: Manifest
    bytes: dict[str, int]


@dataclass(frozen=True)
class Twin(Built):
    """A twin, and what it predicts for every test row, then for every unseen row.

    Attributes:
        expert: by row, whose head answered.
        gate: (row, expert).
        label: by row, the answer.
    """

    expert: list[str]
    gate: Tensor
    label: list[str]


class SeedRun:
    """One seed of a suite: rows, experts, twins, and what contestants share, computed once, when it is needed."""

    def __init__(self, suite: Suite, seed: int, progress: Progress) -> None:
        """Nothing is read yet."""
        self.suite, self.seed, self.progress = suite, seed, progress

    def require_labels(self) -> None:
        """Refuse, before any work, what a build would refuse, and experts that cannot give their rows a label.

        Raises:
            InputError: as `build` does; or naming the expert, what its head gives and what its rows ask for.
        """
        found = checked(self.plan)
        asked = {name: [task.test] for name, task in self.tasks.items()}
        for name, (_, test) in self.unseen.items():
            if head := self.suite.unseen[name].head:
                asked[head].append(test)
        for name, expert in self.plan.experts.items():
            kind = found.answers[name]
            if self.suite.writes:
                if kind is not CONTINUATION or expert.head:
                    raise MismatchError(
                        f"expert {name!r}: the suite judges texts that are written, so every expert must be a language "
                        f"model; found one that gives {kind.kind}"
                    )
                continue
            if kind is not LABEL or not expert.head:
                gives = kind.kind if expert.head else "none of its own"
                classes = ", ".join(expert.config.get("architectures") or ["no class"])
                raise MismatchError(
                    f"expert {name!r}: a suite compares labels of texts or images, so every expert needs a head for "
                    f"their classification; found {gives} ({classes})"
                )
            known = set((expert.config.get("id2label") or {}).values())
            for rows in asked[name]:
                labels = {row["label"] for row in rows}
                if known and not known & labels:
                    raise DataError(
                        f"expert {name!r} can give none of the labels of its test rows: it knows "
                        f"{', '.join(sorted(known)[:5])}, they have {', '.join(sorted(labels)[:5])}"
                    )

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """Tasks with their rows, in the gate's order."""
        return {name: self.suite.task(name, self.seed) for name in sorted(self.suite.tasks)}

    @cached_property
    def plan(self) -> Plan:
        """The suite's own recipe, opened."""
        return open_plan(self.suite.recipe(self.suite.shared, NEXT_TO_NOTHING, None, self.seed))

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

    # --- twins

    def build(
        self, shared: Method, exclusive: ExclusiveSettings, router: RouterSettings | None, split: str = "router"
    ) -> Built:
        """Build a twin, which proves itself if it is asked for more than its shared expert, and load it."""
        recipe = self.suite.recipe(shared, exclusive, router, self.seed, split)
        check = exclusive != NEXT_TO_NOTHING
        with tempfile.TemporaryDirectory() as folder:
            artifact = build(recipe, Path(folder) / "twin", check=check, progress=self.progress)
            return Built(TwinModel.from_pretrained(artifact.path), artifact.manifest, artifact.bytes_per_part())

    def twin(
        self, shared: Method, exclusive: ExclusiveSettings, router: RouterSettings | None, split: str = "router"
    ) -> Twin:
        """Build a twin and let it predict all rows; the suite's own is built once."""
        own = shared == self.suite.shared and (router or self.suite.router) == self.suite.router
        if own and exclusive == self._exclusive and split == "router":
            return self.reference
        return self._predicted(self.build(shared, exclusive, router, split))

    @cached_property
    def reference(self) -> Twin:
        """A twin of the suite's shared expert and router: it routes for contestants without a router of their own."""
        return self._predicted(self.build(self.suite.shared, self._exclusive, None))

    @cached_property
    def _exclusive(self) -> ExclusiveSettings:
        """Of the reference: the first contestant's that is such a twin, so that it need not be built twice."""
        for spec in self.suite.contestants.values():
            here = spec.seeds is None or self.seed in spec.seeds
            if spec.exclusive is not None and here and spec.shared == self.suite.shared and spec.router is None:
                return spec.exclusive
        return NEXT_TO_NOTHING

    def _predicted(self, built: Built) -> Twin:
        rows = [row for _, row in self.test] + [row for parts in self.unseen.values() for p in parts for row in p]
        answers = self.predicted(built.model, rows, "predicting")
        gate = torch.tensor([list(answer["gate"].values()) for answer in answers])
        experts, labels = [answer["expert"] for answer in answers], [said(answer) for answer in answers]
        return Twin(built.model, built.manifest, built.bytes, experts, gate, labels)

    # --- answers

    def predicted(
        self, model: TwinModel, rows: Sequence[Row], stage: str, gate: Mapping[str, float] | None = None
    ) -> list[Answer]:
        """What a twin answers, as a user asks it; under one gate for all, where there is one."""
        answers = []
        with self.autocast():
            for answer in predict(model, inputs_of(rows), max_new_tokens=self.suite.max_new_tokens, gate=gate):
                answers.append(answer)
                self.progress(stage, len(answers), len(rows))
        return answers

    def answers(
        self,
        model: TwinModel,
        rows: Sequence[Row],
        gate: Tensor | None,
        heads: Sequence[str],
        stage: str | None,
        body: Any = None,
    ) -> list[str]:
        """The label that each row's head gives, in the order of the rows, read as its expert reads them.

        Args:
            model: whose heads answer.
            rows: inputs.
            gate: (row, expert); None is the shared expert alone.
            heads: by row, whose head.
            stage: for the progress; None tells nothing.
            body: a full expert's encoder to be used in the place of the gated one.
        """
        labels, done = [""] * len(rows), 0
        readers: dict[str | None, list[int]] = {}
        for index, head in enumerate(heads):
            readers.setdefault(head if model.own_of(head).reads else None, []).append(index)
        for reader, members in readers.items():
            for places, inputs in tokenized_batches(model, [rows[i] for i in members], expert=reader):
                chosen = [members[place] for place in places]
                with self.autocast(), torch.inference_mode():
                    if body is not None:
                        outputs = body(**model.asked(inputs), return_dict=True)
                    else:
                        outputs = model.encode(None if gate is None else gate[chosen], **inputs)
                    answered = model.answer(outputs, [heads[i] for i in chosen], **inputs)
                for index, logits in zip(chosen, answered, strict=True):
                    config: Any = model.heads[heads[index]].config
                    labels[index] = label_of(config, int(logits.argmax()))
                done += len(chosen)
                if stage is not None:
                    self.progress(stage, done, len(rows))
        return labels

    def body(self, name: str, dtype: torch.dtype | None = None) -> Any:
        """An expert's encoder, of `whole`."""
        return self.whole(self.plan, name, dtype).base_model

    def whole(self, plan: Plan, name: str, dtype: torch.dtype | None = None) -> Any:
        """An expert: as transformers loads a full fine-tune, or the base with an adapter's change.

        Args:
            plan: that opened it.
            name: of the expert.
            dtype: of the heads that answer; None is the stored one.
        """
        expert, base = plan.experts[name], plan.base
        if not expert.is_adapter:
            return load_backbone(expert.folder, dtype=dtype)
        state = {}
        for task in plan.tasks:
            own = stored = base.read(task.name)
            if name in task.experts:
                own = (stored.float() + expert.task_vector(task.name, stored)).to(stored.dtype)
            state[task.name] = own.to(dtype) if dtype and own.is_floating_point() else own
        return backbone_from(base, state)

    def written(self, model: Any, rows: Sequence[Row], stage: str) -> list[str]:
        """What a plain language model of transformers writes for rows, greedily, read as the reference reads them."""
        reader, texts = self.reference.model, [""] * len(rows)
        encoded = encode(reader, inputs_of(rows), room=self.suite.max_new_tokens)
        done = 0
        for chosen in batches_of(reader, encoded, DEFAULTS.limits, new=self.suite.max_new_tokens):
            inputs = pad(reader, [encoded[place] for place in chosen], side="left")
            with self.autocast(), torch.inference_mode():
                found = model.generate(**inputs, max_new_tokens=self.suite.max_new_tokens, do_sample=False)
            new = found[:, inputs["input_ids"].shape[1] :]
            decoded = reader.tokenizer.batch_decode(new, skip_special_tokens=True)
            for index, text in zip(chosen, decoded, strict=True):
                texts[index] = first_line(text)
            done += len(chosen)
            self.progress(stage, done, len(rows))
        return texts

    @cached_property
    def expert_answers(self) -> dict[str, list[str]]:
        """Each expert on its own test rows."""
        found, model = {}, self.reference.model
        for name, task in self.tasks.items():
            stage = f"expert {name}"
            if self.suite.writes:
                found[name] = self.written(self.whole(self.plan, name), task.test, stage)
                continue
            body = self.body(name, model.backbone.dtype)
            found[name] = self.answers(model, task.test, None, [name] * len(task.test), stage, body)
        return found


def said(answer: Answer) -> str:
    """An answer's label; of a text that was written its first line that is not empty."""
    return str(answer["label"]) if "label" in answer else first_line(answer["continuation"])


def first_line(text: str) -> str:
    """The first line that is not empty: a model that does not stop is judged by what it said first."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def inputs_of(rows: Iterable[Row]) -> list[Row]:
    """Rows without their labels, which nobody who predicts may see."""
    return [{key: row[key] for key in (*INPUTS, "text_pair") if key in row} for row in rows]
