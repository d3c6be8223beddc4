"""Measures on calibration data what a merge method must know of each expert: tensors that merging reads by name."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twinmerge.errors import MismatchError, RecipeError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.hashes import sha256_of
from twinmerge.files.progress import Progress, silent
from twinmerge.files.rows import Row, read_rows
from twinmerge.files.target import Folder
from twinmerge.files.writer import save_tensors
from twinmerge.hf.answers import (
    CONTINUATION,
    EMBEDDING,
    ENTITIES,
    LABELS,
    SPAN,
    VALUE,
    Answers,
    answers_of,
    require_texts,
)
from twinmerge.hf.classes import LIBRARY
from twinmerge.hf.heads import answered, load_head
from twinmerge.hf.inputs import tokenize
from twinmerge.hf.loading import backbone_from, load_backbone, load_config, load_tokenizer
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.preflight import Checked
from twinmerge.merging.method import Calibrated
from twinmerge.merging.plan import MergePlan
from twinmerge.merging.regmean import BY_COLUMN, BY_ROW
from twinmerge.runtime.layers import form_of

Inputs = Mapping[str, Tensor]
Measure = Callable[["Subject", Sequence[Inputs]], dict[str, Tensor]]


@dataclass(frozen=True)
class Subject:
    """An expert that is measured, whole and in float32."""

    name: str
    model: TwinModel
    """With the expert as its backbone, which has its head, or gives it to the model."""
    answers: Answers
    names: Mapping[str, str]
    """Parameter of the backbone -> what the merge calls it."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that are merged, by the merge's names."""
        own = self.model.backbone.named_parameters()
        return {self.names[name]: value for name, value in own if name in self.names}

    def logits(self, inputs: Inputs) -> Tensor:
        """What the expert says of a batch; see `heads.answered`."""
        if self.name in self.model.heads:
            outputs = self.model.backbone.base_model(**self.model.asked(inputs), return_dict=True)
            return answered(self.model.heads[self.name], outputs, inputs)
        found: Any = self.model.backbone(**inputs)
        logits: Tensor = found.logits if "logits" in found else torch.stack([found.start_logits, found.end_logits], -1)
        return logits


def fisher(subject: Subject, rows: Sequence[Inputs]) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of an expert's parameters (arXiv:2111.09832).

    For every input and class: p(class) (d log p(class) / d theta)^2, summed over classes, averaged over inputs. Each
    input is a batch of its own: squares of a batch's summed gradient would depend on its size.

    Args:
        subject: the expert.
        rows: inputs, a batch of one row each.

    Returns:
        A tensor for each parameter that is merged; zeros where no answer hangs on it.
    """
    parameters = subject.parameters
    sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
    subject.model.backbone.requires_grad_(True)
    for inputs in rows:
        for share, term in _terms(subject.answers, subject.logits(inputs)[0]):
            found = torch.autograd.grad(term, list(parameters.values()), retain_graph=True, allow_unused=True)
            for total, gradient in zip(sums.values(), found, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient, gradient, value=share)
    return {name: total / len(rows) for name, total in sums.items()}


def _terms(answers: Answers, logits: Tensor) -> Iterator[tuple[float, Tensor]]:
    """What is squared of one answer, and its share: log p of each class, by p.

    A value is the mean of a normal distribution of variance 1; each of several labels is given or not by itself, for
    which the sum over both is p (1 - p) (d logit)^2.
    """
    if answers is VALUE:
        yield from ((1.0, value) for value in logits)
    elif answers is LABELS:
        shares = logits.detach().sigmoid()
        yield from ((float(p * (1 - p)), logit) for p, logit in zip(shares, logits, strict=True))
    else:
        each = logits if answers is ENTITIES else logits.T if answers is SPAN else logits[None]
        for distribution in each:
            yield from ((float(log_p.detach().exp()), log_p) for log_p in distribution.log_softmax(dim=-1))


@torch.no_grad()
def grams(subject: Subject, rows: Sequence[Inputs]) -> dict[str, Tensor]:
    """X' X of what every linear layer of an expert reads (arXiv:2212.09849).

    Args:
        subject: the expert.
        rows: inputs, a batch of one row each: nothing is padded.

    Returns:
        An (in, in) tensor for each weight, by its name and which of its axes takes the inputs; zeros where nothing
        reads it.
    """
    modules = [(module, form_of(module)) for module in subject.model.backbone.modules()]
    tied = {id(module.weight) for module, _ in modules if isinstance(module, torch.nn.Embedding)}  # averaged, as read
    merged = {id(value): name for name, value in subject.parameters.items() if id(value) not in tied}
    totals: dict[str, Tensor] = {}
    hooks = []
    for module, form in modules:
        kind = None if form is None else form.kind
        weight: Any = getattr(module, "weight", None)
        name = merged.get(id(weight))
        if name is not None and kind in ("linear", "conv1d"):
            by_column = kind == "linear"
            size = weight.shape[1 if by_column else 0]
            total = totals.setdefault(name + (BY_COLUMN if by_column else BY_ROW), torch.zeros(size, size))
            hooks.append(module.register_forward_pre_hook(_adding_to(total)))
    try:
        for inputs in rows:
            subject.model.backbone(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return totals


def _adding_to(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        read = args[0].flatten(0, -2)
        total.addmm_(read.T, read)

    return add


MEASUREMENTS: Mapping[str, Measure] = {"fisher": fisher, "grams": grams}
"""By the name that a method gives."""


@dataclass(frozen=True)
class Calibration:
    """Everything that measuring needs, checked before any work."""

    method: Calibrated
    rows: Mapping[str, Sequence[Row]]
    load: Callable[[str], Subject]
    """Gives an expert; one is in memory at a time."""

    def record(self) -> dict[str, Any]:
        """What a plan says of it."""
        return {"measurement": self.method.measurement, "calibration_rows": {n: len(r) for n, r in self.rows.items()}}

    def measure(self, target: Folder, progress: Progress = silent) -> dict[str, Checkpoint]:
        """Measure every expert into a file of its own in the work of a target.

        Args:
            target: the folder in work; what an interrupted run measured is verified and kept.
            progress: told after every expert.

        Returns:
            What was measured, by expert.
        """
        measured = {}
        for done, name in enumerate(sorted(self.rows), start=1):
            part, path = f"{self.method.measurement} of {name}", target.work / f"measured-{done}.safetensors"
            if not path.exists() or target.finished.get(part) != sha256_of(path):
                subject = self.load(name)
                inputs = [tokenize(subject.model, [row]) for row in self.rows[name]]
                save_tensors(MEASUREMENTS[self.method.measurement](subject, inputs), path)
                target.record(part, sha256_of(path))
            measured[name] = Checkpoint.open(path)
            progress("measuring experts", done, len(self.rows))
        return measured


def for_twin(found: Checked) -> Calibration | None:
    """What must be measured before a twin's shared expert is merged, None for methods that need nothing.

    Raises:
        InputError: if it cannot be measured.
    """
    plan, method = found.plan, found.plan.recipe.shared
    if not isinstance(method, Calibrated):
        return None
    rows = _checked(method, plan.calibration, found.answers, plan.base.config, plan.recipe.seed)

    def load(name: str) -> Subject:
        """An expert, full or an adapter, under the base's names."""
        expert, state = plan.experts[name], {}
        for task in plan.tasks:
            base = plan.base.read(task.name)
            state[task.name] = base.to(torch.float32, copy=True) if base.is_floating_point() else base
            if name in task.experts:
                state[task.name] += expert.task_vector(task.name, base)
        head = {key: value.float() for key, value in expert.read_head().items()}
        model = TwinModel(
            backbone_from(plan.base.path, state, plan.base.config["architectures"][0]),
            {name: {}},
            heads={name: load_head(expert.config, head)} if head else {},
            tokenizer=_tokenizer(expert.checkpoint.path, plan.base.path),
            max_length=plan.recipe.max_length,
        )
        names = {task.name: task.name for task in plan.tasks if name in task.experts}
        return Subject(name, model, found.answers[name], names)

    return Calibration(method, rows, load)


def for_merge(plan: MergePlan) -> Calibration | None:
    """As `for_twin`, of a static merge, whose models must be transformers folders."""
    method = plan.method(plan.merged[0].name) if plan.merged else None
    if not isinstance(method, Calibrated):
        return None
    if _tokenizer(*plan.merge.experts.values(), plan.reference.path) is None:
        raise MismatchError(f"{plan.reference.path} has no tokenizer, which the texts of calibration_data need")
    answers = {name: answers_of(load_config(path), f"expert {name!r}") for name, path in plan.merge.experts.items()}
    rows = _checked(method, plan.merge.calibration, answers, plan.reference.config, plan.merge.seed)

    def load(name: str) -> Subject:
        """An expert's own folder, as its class loads it; the merge's names are found by where the tensors lie."""
        folder = plan.merge.experts[name]
        backbone, specs = load_backbone(folder, dtype=torch.float32), Checkpoint.open(folder).specs
        stored = {own: specs[name] for name, own in LIBRARY.names(folder, None, specs)[1].items()}
        if lost := [own for own, _ in backbone.named_parameters() if own not in stored]:
            raise MismatchError(
                f"{folder}: {lost[0]!r} of {type(backbone).__name__} is made of other tensors on loading, so what is "
                "measured of it has no name; save the model again with that class"
            )
        places = {(spec.file, spec.offset): merged for merged, spec in plan.experts[name].specs.items()}
        names = {own: places[at] for own, spec in stored.items() if (at := (spec.file, spec.offset)) in places}
        tokenizer = _tokenizer(folder, plan.reference.path)
        return Subject(name, TwinModel(backbone, {name: {}}, tokenizer=tokenizer), answers[name], names)

    return Calibration(method, rows, load)


def _tokenizer(*folders: Path) -> Any:
    """The first one that there is: the expert's own, as its vocabulary is the base's."""
    return next((found for folder in folders if (found := load_tokenizer(folder)) is not None), None)


def _checked(
    method: Calibrated,
    files: Mapping[str, Path],
    answers: Mapping[str, Answers],
    config: Mapping[str, Any],
    seed: int,
) -> dict[str, list[Row]]:
    """The inputs of every expert, as many of each, where all of them can be measured on them."""
    if method.measurement not in MEASUREMENTS:
        raise RecipeError(
            f"merge method {method.method!r} needs the measurement {method.measurement!r}; known are "
            f"{', '.join(MEASUREMENTS)}"
        )
    if not files:
        raise RecipeError(f"merge method {method.method!r} needs calibration_data, a file of inputs for every expert")
    if config.get("is_encoder_decoder"):
        raise MismatchError(f"the models are encoder-decoders; {method.method} is for models of one stack")
    rows = {name: read_rows(files[name], labelled=False) for name in sorted(files)}
    for name, part in rows.items():
        if method.measurement == "fisher" and answers[name] in (CONTINUATION, EMBEDDING):
            raise MismatchError(
                f"expert {name!r} answers with {' and '.join(answers[name].fields)}; {method.method} sums over the "
                "classes of an answer, and takes experts with heads"
            )
        for place, row in enumerate(part, start=1):
            require_texts(answers[name], row, f"{files[name]}:{place}")
    count = min(method.calibration_rows, *(len(part) for part in rows.values()))
    picked = {name: sorted(random.Random(seed).sample(range(len(part)), count)) for name, part in rows.items()}
    return {name: [rows[name][index] for index in indices] for name, indices in picked.items()}
