"""Opens an expert and matches its tensors with the base's parameters; what the base lacks is its head."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinmerge.errors import MismatchError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.models.adapter import open_adapter
from twinmerge.models.compatible import require_unquantised
from twinmerge.models.source import Expert


def open_expert(
    name: str,
    folder: Path,
    base: Checkpoint,
    transposed: Collection[str],
    by_class: Callable[[Checkpoint], Checkpoint],
) -> Expert:
    """Open an expert and match its tensors with the base's, from headers only.

    Args:
        name: the expert's name.
        folder: a transformers folder, or a PEFT LoRA adapter.
        base: the base model.
        transposed: base parameters that a LoRA pair multiplies transposed (embeddings, Conv1D).
        by_class: gives a full model under the names of its class's parameters.

    Raises:
        MismatchError: if a parameter is missing, extra or of another shape, or the architecture differs.
        CheckpointError: if the files cannot be read.
    """
    if (folder / "adapter_config.json").exists():
        return open_adapter(name, folder, base, transposed, _resolver(base))
    opened = Checkpoint.open(folder)
    require_unquantised(opened)
    checkpoint = by_class(opened)
    _require_same_architecture(name, checkpoint.config, base.config)
    match = _match(base, checkpoint)
    missing = [
        name
        for name in base.specs
        if name.startswith(match.root_base) and name not in match.stored and _is_float(base, name)
        if "pooler" not in name.split(".")  # which some classes with a head do without
    ]
    if missing:
        raise MismatchError(
            f"expert {name!r} lacks {len(missing)} of {len(base.specs)} parameters, first {missing[0]!r}; "
            "was it fine-tuned from the same base?"
        )
    taken = set(match.stored.values())
    others = sorted(stored for stored in checkpoint.specs if stored not in taken)
    extra = [stored for stored in others if stored.startswith(match.root_expert) and _is_float(checkpoint, stored)]
    if extra:
        raise MismatchError(
            f"expert {name!r} has {len(extra)} tensors that the base lacks, first {extra[0]!r}; "
            "was it fine-tuned from the same base?"
        )
    head = [stored for stored in others if _is_float(checkpoint, stored)]
    stored = {}
    for parameter, found in match.stored.items():
        if checkpoint.specs[found].shape == base.specs[parameter].shape:
            stored[parameter] = found
        elif found.startswith(match.backbone_root):
            raise MismatchError(
                f"expert {name!r}: {found!r} has shape {list(checkpoint.specs[found].shape)}, "
                f"the base's {parameter!r} {list(base.specs[parameter].shape)}; resize it to the base's shape"
            )
        else:
            head.append(found)
    return Expert(name, checkpoint, stored, {stored: stored for stored in sorted(head)})


def _is_float(checkpoint: Checkpoint, name: str) -> bool:
    """Integer tensors are buffers, which newer files leave out."""
    return checkpoint.specs[name].dtype.is_floating_point


def _require_same_architecture(name: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if found.get("model_type") != expected.get("model_type") and found and expected:
        raise MismatchError(
            f"expert {name!r} is a {found.get('model_type')!r} model, the base is {expected.get('model_type')!r}; "
            "experts must be fine-tuned from the base"
        )


@dataclass(frozen=True)
class _Match:
    """How an expert's names answer to the base's."""

    stored: dict[str, str]
    """Base name -> expert name."""
    root_base: str
    """Base names that open so must all be matched."""
    root_expert: str
    """Expert names that open so must all be matched; what lies outside is the head."""
    backbone_root: str
    """Expert names that open so are backbone, whose shapes must be the base's."""


def _match(base: Checkpoint, expert: Checkpoint) -> _Match:
    """Match names that differ by the prefix of a head model ('bert.encoder...' and 'encoder...')."""
    prefixes = sorted({name.split(".")[0] + "." for name in [*base.specs, *expert.specs] if "." in name})
    candidates = [({n: n for n in base.specs if n in expert.specs}, "", "")]
    for prefix in prefixes:
        candidates.append(({n: prefix + n for n in base.specs if prefix + n in expert.specs}, "", prefix))
        shorter = {n: n.removeprefix(prefix) for n in base.specs if n.startswith(prefix)}
        candidates.append(({n: s for n, s in shorter.items() if s in expert.specs}, prefix, ""))
    stored, root_base, root_expert = max(candidates, key=lambda candidate: len(candidate[0]))
    if root_base or root_expert:
        return _Match(stored, root_base, root_expert, root_expert)
    roots = [name.split(".")[0] + "." for name in stored if "." in name]
    common = max(sorted(set(roots)), key=roots.count) if roots else ""
    same_class = base.config.get("architectures") == expert.config.get("architectures")
    return _Match(stored, "" if same_class else common, "" if same_class else common, common)


def _resolver(base: Checkpoint) -> Callable[[str], str | None]:
    """An adapter's name of a parameter -> the base's, whichever of the two has the prefix of a head model."""
    roots = sorted({n.split(".")[0] for n in base.specs})

    def resolve(name: str) -> str | None:
        if name in base.specs:
            return name
        shorter = name.split(".", 1)[-1]
        if shorter in base.specs:
            return shorter
        return next((f"{root}.{name}" for root in roots if f"{root}.{name}" in base.specs), None)

    return resolve
