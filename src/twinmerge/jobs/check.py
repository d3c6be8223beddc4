"""Proves a build before it is published: the twin as it lies on disk, run on real rows, against its own definition.

Four laws are tried in float32 on a few router rows of every expert (METHOD §7): a gated forward equals the model with
merged weights; a row alone equals the row in its batch; a generation that keeps its cache says what the merged model
says; and a one-hot gate is that expert, as transformers loads it from its own folder, within what compression predicts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import CheckError
from twinmerge.files.progress import Progress, silent
from twinmerge.files.rows import Row, characters_of
from twinmerge.hf.example import example_inputs
from twinmerge.hf.heads import said
from twinmerge.hf.inputs import encode, pad
from twinmerge.hf.loading import backbone_from, load_backbone
from twinmerge.hf.model import TwinModel
from twinmerge.hf.positions import reads_position_table
from twinmerge.twin.plan import Plan

ROWS_PER_EXPERT, TOKENS = 2, 48
"""Rows tried of every expert, and tokens that they are cut at."""
TOLERANCE = 1e-3
"""Relative distance that two ways to compute one float32 output may have: sums are added in another order, and the
norms and softmaxes of some fifty layers pass it on."""
_SLACK = 10.0
"""How many times the predicted distance to an expert is taken for a fault: outputs are not linear in the weights."""
_NEW_TOKENS = 2


@dataclass(frozen=True)
class Agreement:
    """What a twin's one-hot gate gives, beside the expert itself."""

    distance: float
    """|twin - expert| / |shared - expert| of the outputs on the expert's rows: 0 is the expert, 1 the shared expert."""
    predicted: float
    """The same ratio of the weights: sqrt(1 - energy kept), and how far 16 bits round what is stored in them."""


@dataclass(frozen=True)
class CheckReport:
    """What a check found; relative distances, of which each is at most `TOLERANCE`, and the experts' agreements."""

    rows: int
    forward: float | None
    """Gated forward against merged weights."""
    alone: float | None
    """A row alone against the row in its batch."""
    cached: float | None
    """Logits of a generation's steps against the merged model without a cache; None where nothing is generated."""
    experts: dict[str, Agreement]


def check_twin(
    folder: Path,
    plan: Plan,
    rows: Mapping[str, Sequence[Row]],
    kept: Mapping[str, float],
    progress: Progress = silent,
) -> dict[str, Any]:
    """Try the laws on a finished twin; takes a model in float32, and one more while another is held against it.

    Args:
        folder: of the twin, whole.
        plan: what it was built from; experts that the plan did not open are not compared.
        rows: router rows by expert.
        kept: share of the energy that each expert's exclusive part keeps.
        progress: told after every expert.

    Returns:
        A `CheckReport` as JSON holds it.

    Raises:
        CheckError: naming the law, what was found and what is allowed.
    """
    model = TwinModel.from_pretrained(folder, dtype=_precision(plan))
    model.own = {}
    if model.backbone.can_generate():  # by logits alone
        own = model.backbone.generation_config
        starts = {name: getattr(own, name) for name in ("decoder_start_token_id", "bos_token_id")}
        model.backbone.generation_config = type(own)(**starts)
    chosen = {name: _few(rows[name]) for name in model.expert_names}
    agreements = {}
    for done, name in enumerate(sorted(plan.experts), start=1):
        agreements[name] = _agreement(model, plan, name, chosen[name], kept[name])
        progress("checking experts", done, len(plan.experts))
    every = [row for some in chosen.values() for row in some]
    inputs = _encoded(model, every)
    count = len(next(iter(inputs.values())))
    gate = _mixed_gates(count, len(model.expert_names)).to(model.device)
    together = _outputs(model, gate, inputs)
    alone = max(
        distance(_outputs(model, gate[i : i + 1], _row(inputs, i))[0], together[i]) for i in range(min(count, 4))
    )
    require_law("a row alone must give what it gives in a batch", alone)
    forward = max(distance(_merged_output(model, gate[i], _row(inputs, i)), together[i]) for i in (0, count - 1))
    require_law("a gated forward must equal the model with merged weights", forward)
    cached = _cached(model, gate[:2], every[:2])
    return asdict(CheckReport(count, _short(forward), _short(alone), _short(cached), agreements))


def _short(number: float | None) -> float | None:
    """Two digits: how sums are rounded differs from machine to machine."""
    return None if number is None else float(f"{number:.1e}")


def _precision(plan: Plan) -> torch.dtype | None:
    """At least float32: what is compared is the way to compute, not how a narrow type rounds."""
    widest = max(spec.dtype.itemsize for spec in plan.base.specs.values() if spec.dtype.is_floating_point)
    return torch.float32 if widest < 4 else None


def _agreement(model: TwinModel, plan: Plan, name: str, rows: Sequence[Row], kept: float) -> Agreement:
    """The expert's own output on its rows beside the twin's and the shared expert's.

    BatchNorm's statistics that were estimated anew are meant to be others, which nothing predicts.
    """
    inputs = _encoded(model, rows)
    count = len(next(iter(inputs.values())))
    ours = _outputs(model, model.one_hot([name] * count), inputs, name)
    own = _expert_outputs(model, plan, name, inputs)
    shared = _outputs(model, torch.zeros(count, len(model.expert_names), device=model.device), inputs, name)
    apart = sum(float((a - b).square().sum()) for a, b in zip(shared, own, strict=True)) ** 0.5
    off = sum(float((a - b).square().sum()) for a, b in zip(ours, own, strict=True)) ** 0.5
    size = sum(float(b.square().sum()) for b in own) ** 0.5
    predicted = (max(1.0 - kept, 0.0) + _rounding(plan, name) ** 2) ** 0.5
    if plan.recipe.exclusive.bn != "recalibrate" and off > TOLERANCE * size + _SLACK * predicted * apart:
        raise CheckError(
            f"expert {name!r} is not served as it serves itself: under its own gate the twin is off by {off:.3g} where "
            f"expert and shared expert are {apart:.3g} apart, and compression accounts for {predicted * apart:.3g}; "
            "nothing was published; report the model's class, or publish without this check (--no-check)"
        )
    return Agreement(round(off / apart, 4) if apart else 0.0, round(predicted, 4))


def _rounding(plan: Plan, name: str) -> float:
    """Relative rounding of an expert's parts as they are stored; that of 8 and 4 bits is in the energy kept."""
    stored = [plan.stored_dtype(task) for task in plan.tasks if name in task.experts]
    return max((torch.finfo(dtype).eps for dtype in stored if dtype.itemsize > 1), default=0.0)


def _expert_outputs(model: TwinModel, plan: Plan, name: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The expert as transformers loads it; an adapter's is its base with the task vectors added."""
    expert = plan.experts[name]
    if expert.is_adapter:
        state = {}
        for task in plan.tasks:
            base = plan.base.read(task.name)
            moved = task.spec.dtype.is_floating_point and name in task.experts
            own = base + expert.task_vector(task.name, base) if moved else base
            state[task.name] = own.to(model.backbone.dtype) if own.is_floating_point() else own
        plain = backbone_from(plan.base, state)
    else:
        plain = load_backbone(expert.folder, dtype=model.backbone.dtype)
    found = []
    for index in range(len(next(iter(inputs.values())))):  # each alone: an expert may know padding by another id
        row = _row(inputs, index)
        with torch.inference_mode():
            body = expert.is_adapter and bool(model.heads)
            outputs = plain.base_model(**model.asked(row)) if body else plain(**row, return_dict=True)
        if expert.is_adapter and model.heads:
            found += [logits.float() for logits in model.answer(outputs, [name], **row)]
        else:
            found += [model.own_logits(value, name) for value in _rows_of(outputs, row)]
    return found


def _outputs(model: TwinModel, gate: Tensor, inputs: Mapping[str, Tensor], expert: str | None = None) -> list[Tensor]:
    """What the twin gives under a gate, row by row, over real tokens."""
    found = model(gate=gate, expert=expert, **inputs)
    return [_own(model, value, name) for value, name in zip(_rows_of(found, inputs), found.expert, strict=True)]


def _own(model: TwinModel, values: Tensor, name: str) -> Tensor:
    """A row's logits by the ids of an expert's own tokenizer; a token that nobody may say counts as 0."""
    values = model.own_logits(values, name)
    return values if model.vocabulary is None else values.masked_fill(values == -torch.inf, 0.0)


def _merged_output(model: TwinModel, gate: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return _rows_of(model.materialize(gate)(**inputs, return_dict=True), inputs)[0]


def _rows_of(outputs: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """A row's logits, or hidden states where there are none; those of padding mean nothing."""
    values = list(said(outputs))
    mask = inputs.get("attention_mask")
    by_token = [mask is not None and value.ndim == 2 and len(value) == mask.shape[1] for value in values]
    return [(v[inputs["attention_mask"][i].bool()] if by_token[i] else v).float() for i, v in enumerate(values)]


def _cached(model: TwinModel, gate: Tensor, rows: Sequence[Row]) -> float | None:
    """How far the chosen tokens' logits are from the best ones' of the merged model, which reads all anew."""
    if model.heads or not model.backbone.can_generate():
        return None
    decodes = model.backbone.config.is_encoder_decoder
    # under padding on the left such a model may say something else, which `predict` does not do either
    rows = [rows[0]] * len(rows) if rows and reads_position_table(model.backbone) else rows
    inputs: dict[str, Any] = _encoded(model, rows, side="right" if decodes else "left")
    if not rows:  # of one length: their padding is on the right
        inputs = {name: values[:1].repeat_interleave(len(gate), dim=0) for name, values in inputs.items()}
    inputs.pop("decoder_input_ids", None)
    if "attention_mask" not in inputs:  # nothing says what is padding: prompts of one length share a batch
        return None
    prompt = 1 if decodes else inputs["input_ids"].shape[1]
    written = model.generate(
        **inputs, gate=gate, do_sample=False, min_new_tokens=_NEW_TOKENS, max_new_tokens=_NEW_TOKENS
    )
    worst = 0.0
    for index, row in enumerate(gate):
        start = 0 if decodes else prompt - int(inputs["attention_mask"][index].sum())
        own = written[index : index + 1, start:]
        if model.vocabulary is not None:
            own = model.vocabulary.own_ids(own, model.expert_names[int(row.argmax())])
        whole = {**_row(inputs, index), "decoder_input_ids": own} if decodes else {"input_ids": own}
        with torch.inference_mode():
            logits = model.materialize(row)(**whole).logits[0].float()
        for place in range(prompt - start - 1, logits.shape[0] - 1):
            scores, said = logits[place], own[0, place + 1]
            worst = max(worst, float((scores.max() - scores[said]) / scores.norm()))
    require_law("a generation that keeps its cache must say what the merged model says", worst)
    return worst


def require_law(law: str, found: float) -> None:
    """Refuse a twin that breaks a law by more than `TOLERANCE`.

    Raises:
        CheckError: naming it.
    """
    if not found <= TOLERANCE:
        raise CheckError(
            f"{law}: the relative distance must be at most {TOLERANCE:g}, found {found:.3g}; nothing was published; "
            "report the model's class, or publish without this check (--no-check)"
        )


def distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def _few(rows: Sequence[Row]) -> list[Row]:
    """The shortest and the longest of the first rows: what shares a batch has different lengths."""
    by_length = sorted(rows[:64], key=characters_of)
    if not rows:
        return []
    return [by_length[0], by_length[-1]][:ROWS_PER_EXPERT]


def _encoded(model: TwinModel, rows: Sequence[Row], *, side: Any = "right") -> dict[str, Tensor]:
    """Rows as the model takes them; where there are none, ids or pixels that mean nothing."""
    if not rows:
        return example_inputs(model.backbone, ROWS_PER_EXPERT)
    encoded = encode(model, rows)
    if not model.reads_images:
        encoded = [{key: values[:TOKENS] for key, values in one.items()} for one in encoded]
    inputs, config = pad(model, encoded, side=side), model.backbone.config
    if config.is_encoder_decoder and not model.heads:  # what the decoder has written so far: the input, begun anew
        ids, first = inputs["input_ids"], getattr(config.get_text_config(), "decoder_start_token_id", None) or 0
        inputs["decoder_input_ids"] = torch.cat([torch.full_like(ids[:, :1], first), ids[:, :-1]], dim=1)
    return inputs


def _row(inputs: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """One row, its padding cut off."""
    row = {name: value[index : index + 1] for name, value in inputs.items()}
    if "attention_mask" in row:
        real = int(row["attention_mask"].sum())
        row = {name: value[:, :real] for name, value in row.items()}
    return row


def _mixed_gates(rows: int, experts: int) -> Tensor:
    """(row, expert) gates with every expert in them, no two alike."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(rows, experts, generator=generator).add(0.1).log().softmax(dim=1)
