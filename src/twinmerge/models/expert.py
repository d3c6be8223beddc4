"""Opens experts, full fine-tunes and adapters, on the part of the base that they share."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from twinmerge.errors import MismatchError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.strict_json import read_json
from twinmerge.models.adapter import adapted_class, open_adapter
from twinmerge.models.match import match
from twinmerge.models.source import Expert, Library, Model, open_model


def shared_model(base: Model, folders: Iterable[Path], library: Library) -> Model:
    """What the shared expert is made of: the base, if every expert is of its class and speaks; else its backbone.

    The base's own head is no expert's, whatever its shape, and takes no part.

    Args:
        base: the base model, of its own class.
        folders: the experts'.
        library: knows classes.
    """
    if not base.layout.root or (
        base.layout.speaks and {_class(f, base, library) for f in folders} == {base.layout.cls}
    ):
        return base
    return open_model(base.checkpoint.path, library, cls=base.layout.backbone)


def open_expert(
    name: str,
    folder: Path,
    base: Model,
    shared: Model,
    conv1d: Collection[str],
    library: Library,
    *,
    cls: str | None = None,
    head: Checkpoint | None = None,
) -> Expert:
    """Open an expert and match its tensors with the shared expert's, from headers only.

    Args:
        name: the expert's name.
        folder: a transformers folder, or a PEFT adapter.
        base: the base model, of its own class.
        shared: see `shared_model`.
        conv1d: parameters that are stored transposed, as Conv1D's.
        library: knows classes.
        cls: its class; None is the one that its files name.
        head: tensors of its head that its adapter lacks.

    Raises:
        MismatchError: if a parameter is missing, extra or of another shape, or the architecture differs.
        CheckpointError: if the files cannot be read.
    """
    if _is_adapter(folder):
        return open_adapter(name, folder, base, shared, conv1d, library, cls=cls, head=head)
    if head is not None:
        raise MismatchError(f"experts.{name}.head is for adapters without one, and {folder} is a full model")
    like = None if _named(folder) else base.checkpoint.path
    return match(name, open_model(folder, library, like=like, cls=cls), shared)


def with_labels(expert: Expert, labels: Sequence[str]) -> Expert:
    """An expert whose head's classes have these names.

    Raises:
        MismatchError: if it has no head, or one with another number of classes.
    """
    known = expert.config.get("id2label") or {}
    if not expert.head or len(known) != len(labels) or len(set(labels)) < len(labels):
        found = f"a head of {len(known)} classes" if expert.head else "no head"
        raise MismatchError(
            f"experts.{expert.name}.labels must be as many names as its head has classes, no two alike, found "
            f"{len(labels)} names and {found}"
        )
    names = {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {n: i for i, n in enumerate(labels)},
    }
    return replace(expert, checkpoint=replace(expert.checkpoint, config={**expert.config, **names}))


def _class(folder: Path, base: Model, library: Library) -> str:
    return adapted_class(folder, base, library) if _is_adapter(folder) else _named(folder) or base.layout.cls


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def _named(folder: Path) -> str | None:
    """The class that a folder's config.json names, if any."""
    config = folder / "config.json"
    return next(iter(read_json(config).get("architectures") or []), None) if config.exists() else None
