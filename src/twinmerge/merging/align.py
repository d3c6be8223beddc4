"""Brings the models of a static merge to the reference's names, and their heads to its order of labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from twinmerge.errors import MismatchError
from twinmerge.files.checkpoint import Checkpoint, TensorSpec
from twinmerge.models.compatible import compare_tensors


@dataclass(frozen=True)
class Aligned:
    """A model under the reference's names."""

    checkpoint: Checkpoint
    lacking: frozenset[str]
    """What the reference has beside the backbone and this model does not: another head, a pooler."""
    head: tuple[str, ...]
    """What this model has beside the backbone and the reference does not."""


def align(reference: Checkpoint, name: str, model: Checkpoint) -> Aligned:
    """Give a model the reference's names, where one of the two has the prefix of a class with a head.

    Without a class to ask, names decide: `bert.encoder.…` of one is `encoder.…` of the other if most names say so. Two
    classes on one backbone (as their configs say) must agree on the backbone alone.

    Raises:
        MismatchError: if the model has a tensor too few or too many, or of another shape.
    """
    if model is reference:
        return Aligned(model, frozenset(), ())
    ours, theirs = set(reference.specs), set(model.specs)
    found: list[tuple[int, str, str]] = [(len(ours & theirs), "", "")]
    for prefix in _prefixes(theirs):
        found.append((sum(prefix + tensor in theirs for tensor in ours), "", prefix))
    for prefix in _prefixes(ours):
        found.append((sum(prefix + tensor in ours for tensor in theirs), prefix, ""))
    _, our_root, their_root = max(found, key=lambda one: one[0])
    classes = reference.config.get("architectures"), model.config.get("architectures")
    new_names = {
        tensor: our_root + tensor.removeprefix(their_root) for tensor in theirs if tensor.startswith(their_root)
    }
    if not our_root and not their_root and all(classes) and classes[0] != classes[1]:
        our_root = their_root = backbone_root(reference.specs[tensor] for tensor in ours & theirs)
        new_names = {tensor: tensor for tensor in theirs if tensor in ours or tensor.startswith(their_root)}
    beside = our_root or their_root
    specs = {new_names[t]: replace(spec, name=new_names[t]) for t, spec in model.specs.items() if t in new_names}
    lacking = {
        tensor
        for tensor, spec in reference.specs.items()
        if beside and tensor not in specs and spec.dtype.is_floating_point
        if not tensor.startswith(our_root) or "pooler" in tensor.split(".")
    }
    aligned, needed = replace(model, specs=specs), {t: s for t, s in reference.specs.items() if t not in lacking}
    compare_tensors(replace(reference, specs=needed), name, aligned)
    return Aligned(aligned, frozenset(lacking), tuple(sorted(theirs - new_names.keys())))


def backbone_root(specs: Iterable[TensorSpec]) -> str:
    """What the names of most numbers begin with: `model.`, `bert.`; what lies outside is a head."""
    counted = Counter[str]()
    for spec in specs:
        counted[spec.name.split(".")[0] + "." if "." in spec.name else ""] += spec.numel
    return max(sorted(counted), key=counted.__getitem__, default="")


def _prefixes(names: Collection[str]) -> list[str]:
    return sorted({f"{name.split('.')[0]}." for name in names if "." in name})


@dataclass(frozen=True)
class Labels:
    """In which order the rows of the merged head are."""

    names: tuple[str, ...] = ()
    """Labels from the first row to the last; empty if no model names any."""
    tensors: frozenset[str] = frozenset()
    """The head's tensors whose rows are labels."""
    rows: Mapping[str, list[int]] = field(default_factory=dict)
    """Which rows of an expert's tensors come one after the other; only of experts with another order."""
    notes: tuple[str, ...] = ()


def order_labels(reference: Checkpoint, experts: Mapping[str, Checkpoint], merged: Collection[str]) -> Labels:
    """Find how the rows of experts' heads must be ordered before they are merged.

    Args:
        reference: whose order is kept, if it names its labels; else that of the first expert that does.
        experts: under the reference's names.
        merged: tensors that are merged.

    Raises:
        MismatchError: if heads answer with different labels, or their rows cannot be told.
    """
    named = {name: labels for name, model in experts.items() if (labels := _labels_of(model.config))}
    first, wanted = repr(reference.path.name), _labels_of(reference.config)
    if not wanted and named:
        first, wanted = next((repr(name), labels) for name, labels in named.items())
    specs = reference.specs
    root = backbone_root(specs[tensor] for tensor in merged)
    count = len(wanted)
    tensors = [t for t in merged if not t.startswith(root) and specs[t].shape and specs[t].shape[0] == count]
    if not wanted or not tensors:
        return Labels()
    rows, notes = {}, []
    for name, labels in named.items():
        if labels == wanted:
            continue
        if sorted(labels) != sorted(wanted):
            odd = min(set(labels) ^ set(wanted))
            raise MismatchError(
                f"expert {name!r} answers with other labels than {first} ({odd!r} is one); heads of different labels "
                "cannot be merged: `twinmerge build` keeps every expert's own"
            )
        if len(tensors) > 2 or sum(len(specs[t].shape) > 1 for t in tensors) != 1:
            raise MismatchError(
                f"expert {name!r} has the labels of {first} in another order ({', '.join(labels)}), and which rows of "
                f"its head they are cannot be told ({', '.join(tensors)}); save it again with them in the same order"
            )
        rows[name] = [labels.index(label) for label in wanted]
        notes.append(f"{name!r}: the rows of its head are put in the order of {first}: {', '.join(wanted)}")
    notes += [
        f"{n!r} names no labels; its head is taken to be in the order of {first}" for n in experts if n not in named
    ]
    return Labels(tuple(wanted), frozenset(tensors), rows, tuple(notes))


def _labels_of(config: Mapping[str, Any]) -> list[str]:
    """A model's labels in their order; none if it has only numbers for them."""
    table = config.get("id2label")
    labels = [str(table[str(i)]) for i in range(len(table)) if str(i) in table] if isinstance(table, dict) else []
    generic = [f"LABEL_{i}" for i in range(len(labels))]
    return [] if labels == generic or len(set(labels)) != len(table or ()) else labels
