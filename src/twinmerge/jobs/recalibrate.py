"""Estimates BatchNorm's running statistics anew, through the weights as a twin keeps them (arXiv:2211.08403)."""

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from twinmerge.errors import DataError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.progress import Progress, silent
from twinmerge.files.rows import Row
from twinmerge.files.writer import save_tensors
from twinmerge.hf.images import load_processor
from twinmerge.hf.inputs import tokenized_batches
from twinmerge.hf.loading import load_backbone, load_tokenizer
from twinmerge.hf.model import TwinModel
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.twin.plan import BATCH_STATISTICS

ROWS = 512
"""Of each expert, at most."""


def recalibrate(
    twin: TwinArtifact,
    rows: Mapping[str, Sequence[Row]],
    *,
    only: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> None:
    """Put means and variances that inputs have in a twin into its files.

    The shared expert's are those of all experts' inputs together, each expert's those of its own inputs under its own
    gate: what compression took from its weights moved them.

    Args:
        twin: its weights as they lie on disk; rewritten are the shared expert's and the experts' files of vectors.
        rows: inputs of every expert, two or more; labels are not used.
        only: the one expert whose statistics are estimated; the shared expert's stay. None takes all.
        seed: of the order of inputs, and of which are used where there are more than `ROWS`.
        progress: told after every expert.
    """
    backbone = load_backbone(twin.path, dtype=torch.float32)
    shared = {n: b for n, b in backbone.named_buffers() if n.endswith(BATCH_STATISTICS)}
    if not shared:
        return
    model = TwinModel(
        backbone,
        {n: {key: part.to(torch.float32) for key, part in twin.exclusive(n).items()} for n in twin.expert_names},
        tokenizer=load_tokenizer(twin.path),
        processor=load_processor(twin.path, backbone),
        max_length=twin.manifest.recipe.max_length,
    )
    draw = random.Random(seed)
    chosen = {name: draw.sample(list(rows[name]), min(ROWS, len(rows[name]))) for name in sorted(rows)}
    shared = {name: value.clone() for name, value in shared.items()}
    if only is None:
        every = [row for part in chosen.values() for row in part]
        shared = _estimated(model, torch.zeros(len(chosen)), draw.sample(every, len(every)))
        _exchange(twin, twin.shared, shared)
        shared = {name: twin.shared.read(name).float() for name in shared}  # as it is rounded
    names = [only] if only is not None else list(twin.expert_names)
    for done, name in enumerate(names, start=1):
        own = _estimated(model, model.one_hot([name])[0], chosen[name])
        file = twin.path / "experts" / name / "exclusive.safetensors"
        beside = Checkpoint.open(file) if file.exists() else None
        kept = {n: beside.read(n) for n in beside.specs} if beside is not None else {}
        save_tensors({**kept, **{n: (own[n] - shared[n]).to(twin.shared.specs[n].dtype) for n in shared}}, file)
        progress("recalibrating BatchNorm", done, len(names))


def _estimated(model: TwinModel, gate: Tensor, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Running statistics by name: the mean over batches of what each batch has.

    Raises:
        DataError: if every input is of another size, so that none shares a batch.
    """
    plain = model.materialize(gate)
    for module in plain.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # torch's word for the mean of all batches
            module.train()
    batches = 0
    with torch.no_grad():
        for chosen, inputs in tokenized_batches(model, rows):
            if len(chosen) > 1:  # one alone may have no variance
                plain(**inputs)
                batches += 1
    if not batches:
        raise DataError(
            "exclusive.bn: recalibrate needs inputs that share a batch, and no two of an expert's have one size; let "
            "the processor resize them, or use per_expert"
        )
    return {n: b for n, b in plain.named_buffers() if n.endswith(BATCH_STATISTICS)}


def _exchange(twin: TwinArtifact, checkpoint: Checkpoint, values: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of others of a checkpoint."""
    for file in sorted({checkpoint.specs[name].file for name in values}):
        held = {n: checkpoint.read(n) for n, spec in checkpoint.specs.items() if spec.file == file}
        new = {n: values[n].to(held[n].dtype) for n in values if n in held}
        save_tensors({**held, **new}, file)
    twin.__dict__.pop("shared", None)  # whose headers were read before
