"""Measures on calibration data what a merge method must know of each expert: tensors that merging reads by name."""

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import MismatchError, RecipeError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.hashes import sha256_of, sha256_of_json
from twinmerge.files.progress import Progress, silent
from twinmerge.files.rows import Row, read_rows
from twinmerge.files.tables import RowFile
from twinmerge.files.target import Folder
from twinmerge.files.writer import save_tensors
from twinmerge.hf.answers import CONTINUATION, EMBEDDING, LABEL, Answers, answers_of, require_texts
from twinmerge.hf.classes import LIBRARY
from twinmerge.hf.heads import load_head
from twinmerge.hf.images import PROCESSOR, load_processor
from twinmerge.hf.inputs import tokenize
from twinmerge.hf.loading import backbone_from, load_backbone, load_config, load_tokenizer
from twinmerge.hf.measurements import MEASUREMENTS, Inputs, Subject, moments
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.learn import Learning
from twinmerge.jobs.preflight import Checked
from twinmerge.merging.adamerging import ENTROPY, AdaMerging
from twinmerge.merging.method import Calibrated
from twinmerge.merging.plan import MergePlan
from twinmerge.twin.plan import weighted


@dataclass(frozen=True)
class Calibration:
    """Everything that measuring needs, checked before any work."""

    measurement: str
    """What it is called."""
    rows: Mapping[str, Sequence[Row]]
    load: Callable[[str], Subject]
    """Gives an expert; one is in memory at a time."""
    measures: Callable[[Subject, Sequence[Inputs]], Iterable[Mapping[str, Tensor]]]
    """Gives tensors by name, in portions that fit in memory."""

    def record(self) -> dict[str, Any]:
        """What a plan says of it."""
        return {"measurement": self.measurement, "calibration_rows": {n: len(r) for n, r in self.rows.items()}}

    def measure(self, target: Folder, progress: Progress = silent) -> dict[str, Checkpoint]:
        """Measure every expert into files of its own in the work of a target.

        Args:
            target: the folder in work; what an interrupted run measured is verified and kept.
            progress: told after every expert.

        Returns:
            What was measured, by expert.
        """
        measured = {}
        for done, name in enumerate(sorted(self.rows), start=1):
            part = f"{self.measurement} of {name}"
            paths = sorted(target.work.glob(f"{self.measurement}-{done}-*.safetensors"))
            if not paths or target.finished.get(part) != _digest(paths):
                subject, paths = self.load(name), []
                inputs = [tokenize(subject.model, [row]) for row in self.rows[name]]
                for portion, tensors in enumerate(self.measures(subject, inputs)):
                    paths.append(target.work / f"{self.measurement}-{done}-{portion:05}.safetensors")
                    save_tensors(tensors, paths[-1])
                target.record(part, _digest(paths))
            specs = {name: spec for path in paths for name, spec in Checkpoint.open(path).specs.items()}
            measured[name] = Checkpoint(target.work, specs, {})
            progress("measuring experts", done, len(self.rows))
        return measured


def _digest(paths: Sequence[Path]) -> str:
    return sha256_of_json([sha256_of(path) for path in paths])


def for_twin(found: Checked) -> Calibration | Learning | None:
    """What must be measured before a twin's shared expert is merged, None for methods that need nothing.

    Raises:
        InputError: if it cannot be measured.
    """
    plan, method = found.plan, found.plan.recipe.shared
    if not isinstance(method, Calibrated):
        return None
    rows = _checked(method, plan.calibration, found.answers, plan.base.config, plan.recipe.seed)
    load = _subjects(found, {task.name for task in plan.tasks})
    if isinstance(method, AdaMerging):
        return _learning(method, rows, load, plan.base, plan.recipe.seed)
    return Calibration(method.measurement, rows, load, _whole(method))


def _learning(
    method: AdaMerging, rows: Mapping[str, Sequence[Row]], load: Callable[[str], Subject], base: Checkpoint, seed: int
) -> Learning:
    entries = sum(spec.numel for spec in base.specs.values() if spec.dtype.is_floating_point)
    return Learning(method, rows, load, base.read, seed, entries)


def for_weighting(found: Checked, memory_bytes: int) -> Calibration | None:
    """What must be measured before directions are weighed, None where all count alike.

    Args:
        found: a plan, whose weighting is settled.
        memory_bytes: what a process may take; half of it is for what is measured.
    """
    plan, settings = found.plan, found.plan.recipe.exclusive
    tasks = {task.name for task in weighted(plan)}
    if not tasks:
        return None
    rows = {name: _drawn(found.rows[name], settings.weighting_rows, plan.recipe.seed) for name in plan.experts}
    measures = partial(
        moments,
        gradients=settings.weighting == "two_sided",
        seed=plan.recipe.seed,
        most_bytes=memory_bytes // 2,
    )
    return Calibration("moments", rows, _subjects(found, tasks), measures)


def _whole(method: Calibrated) -> Callable[[Subject, Sequence[Inputs]], Iterable[Mapping[str, Tensor]]]:
    """A method's measurement, all of it at once."""
    return lambda subject, inputs: [MEASUREMENTS[method.measurement](subject, inputs)]


def _subjects(found: Checked, measured: Collection[str]) -> Callable[[str], Subject]:
    """Gives a twin's experts, full or adapters, under the base's names, to be measured at some parameters."""
    plan = found.plan

    def load(name: str) -> Subject:
        expert, state = plan.experts[name], {}
        for task in plan.tasks:
            base = plan.base.read(task.name)
            state[task.name] = base.to(torch.float32, copy=True) if base.is_floating_point() else base
            if name in task.experts:
                state[task.name] += expert.task_vector(task.name, base)
        head = {key: value.float() for key, value in expert.read_head().items()}
        backbone = backbone_from(plan.base, state)
        model = TwinModel(
            backbone,
            {name: {}},
            heads={name: load_head(expert.config, head)} if head else {},
            tokenizer=_tokenizer(expert.checkpoint.path, plan.base.path),
            processor=_processor(backbone, expert.checkpoint.path, plan.base.path),
            max_length=plan.recipe.max_length,
        )
        names = {task.name: task.name for task in plan.tasks if name in task.experts and task.name in measured}
        return Subject(name, model, found.answers[name], names)

    return load


def for_merge(plan: MergePlan) -> Calibration | Learning | None:
    """As `for_twin`, of a static merge, whose models must be transformers folders."""
    method = plan.method(plan.merged[0].name) if plan.merged else None
    if not isinstance(method, Calibrated):
        return None
    folders = (*plan.merge.experts.values(), plan.reference.path)
    if _tokenizer(*folders) is None and not any((folder / PROCESSOR).is_file() for folder in folders):
        raise MismatchError(
            f"{plan.reference.path} has no tokenizer and no image processor, one of which calibration_data need"
        )
    answers = {name: answers_of(load_config(path), f"expert {name!r}") for name, path in plan.merge.experts.items()}
    files = {name: RowFile(path) for name, path in plan.merge.calibration.items()}
    rows = _checked(method, files, answers, plan.reference.config, plan.merge.seed)

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
        processor = _processor(backbone, folder, plan.reference.path)
        model = TwinModel(backbone, {name: {}}, tokenizer=tokenizer, processor=processor)
        return Subject(name, model, answers[name], names)

    if isinstance(method, AdaMerging):
        return _learning(method, rows, load, plan.reference, plan.merge.seed)
    return Calibration(method.measurement, rows, load, _whole(method))


def _tokenizer(*folders: Path) -> Any:
    """The first one that there is: the expert's own, as its vocabulary is the base's."""
    return next((found for folder in folders if (found := load_tokenizer(folder)) is not None), None)


def _processor(model: Any, *folders: Path) -> Any:
    """The same of processors of the images that a model reads."""
    return next((found for folder in folders if (found := load_processor(folder, model)) is not None), None)


def _checked(
    method: Calibrated,
    files: Mapping[str, RowFile],
    answers: Mapping[str, Answers],
    config: Mapping[str, Any],
    seed: int,
) -> dict[str, list[Row]]:
    """The inputs of every expert, as many of each, where all of them can be measured on them."""
    if method.measurement not in (*MEASUREMENTS, ENTROPY):
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
        if method.measurement == ENTROPY and answers[name] is not LABEL:
            raise MismatchError(
                f"expert {name!r} answers with {' and '.join(answers[name].fields)}; {method.method} makes answers of "
                "one label among several sure, and takes such classifiers"
            )
        for place, row in enumerate(part, start=1):
            require_texts(answers[name], row, f"{files[name].path}:{place}")
    count = min(method.calibration_rows, *(len(part) for part in rows.values()))
    return {name: _drawn(part, count, seed) for name, part in rows.items()}


def _drawn(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """As many of the rows, in their order."""
    picked = sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
    return [rows[index] for index in picked]
