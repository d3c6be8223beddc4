"""Matches an expert's tensors with the shared expert's; what lies outside its class's backbone is its own head."""

from collections.abc import Mapping, Sequence

from twinmerge.errors import MismatchError
from twinmerge.files.checkpoint import TensorSpec
from twinmerge.models.source import Expert, Layout, Model


def place(layout: Layout, shared: Model, name: str) -> tuple[bool, str | None]:
    """Where a tensor of an expert's class is: whether in its head, and its name there or in the shared expert.

    A pooler that the shared expert lacks goes with the head. The name is None if there is no place.
    """
    if layout.cls == shared.layout.cls:
        return False, name if name in shared.checkpoint.specs else None
    parameter = shared.layout.root + name.removeprefix(layout.root)
    inside = name.startswith(layout.root)
    if inside and parameter in shared.checkpoint.specs:
        return False, parameter
    if inside and not (layout.root and name.startswith(f"{layout.root}pooler.")):
        return False, None
    return True, name


def match(name: str, model: Model, shared: Model) -> Expert:
    """A full model as an expert.

    Raises:
        MismatchError: if it does not fit the shared expert.
    """
    layout, found = model.layout, model.checkpoint
    require_backbone(name, layout, shared, found.config.get("model_type"))
    if lacking := sorted(layout.required - set(found.specs)):
        of_base = place(layout, shared, lacking[0])[1] or lacking[0]
        raise MismatchError(
            f"expert {name!r} lacks {len(lacking)} of {len(layout.required)} parameters, first {of_base!r}; "
            "was it fine-tuned from the same base?"
        )
    for table in layout.vocabulary:
        if table in found.specs and found.specs[table].shape != layout.shapes[table]:
            raise MismatchError(
                f"expert {name!r}: {table!r} has shape {list(found.specs[table].shape)}, by config.json it must be "
                f"{list(layout.shapes[table])}; one of them is wrong"
            )
    stored, head, extra = fit(f"expert {name!r}", layout, shared, found.specs)
    pooler = [one for one in (*extra, *model.left_out) if "pooler" in one.split(".")]  # which no head reads
    if extra := [one for one in (*extra, *model.left_out) if one not in pooler]:
        raise MismatchError(
            f"expert {name!r} has {len(extra)} tensors that the base lacks, first {extra[0]!r}; "
            "was it fine-tuned from the same base?"
        )
    return Expert(name, found, stored, head, (left_out_note(repr(name), layout, pooler),) if pooler else ())


def left_out_note(whose: str, layout: Layout, names: Sequence[str]) -> str:
    """What a plan says of tensors that are no part of the twin."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{whose}: {names[0]!r}{more} are left out, which a {layout.cls} does not use here"


def require_whole(what: str, model: Model) -> None:
    """Refuse a model that its class would not load: with a tensor too few, or of another shape than config.json says.

    Raises:
        MismatchError: naming the first tensor.
    """
    path, specs = model.checkpoint.path, model.checkpoint.specs
    if lacking := sorted(model.layout.required - set(specs)):
        raise MismatchError(
            f"{what} {path} lacks {len(lacking)} parameters of {model.layout.cls}, first {lacking[0]!r}"
        )
    for name, spec in specs.items():
        if spec.shape != model.layout.shapes[name]:
            raise MismatchError(
                f"{what} {path}: {name!r} has shape {list(spec.shape)}, by config.json it must be "
                f"{list(model.layout.shapes[name])}; one of them is wrong"
            )


def fit(
    whose: str, layout: Layout, shared: Model, specs: Mapping[str, TensorSpec]
) -> tuple[dict[str, str], tuple[str, ...], list[str]]:
    """Sort tensors of an expert's class.

    Returns:
        Parameter of the shared expert -> tensor; tensors of the head; floats that have no place.

    Raises:
        MismatchError: if one has another shape than the parameter; tables over the vocabulary may have more rows.
    """
    stored, head, extra = {}, [], []
    for name, spec in specs.items():
        in_head, found = place(layout, shared, name)
        if in_head:
            head.append(name)
        elif found is None:
            extra += [name] if spec.dtype.is_floating_point else []
        elif spec.shape != shared.checkpoint.specs[found].shape and not _grown(spec, shared, found):
            raise MismatchError(
                f"{whose}: {name!r} has shape {list(spec.shape)}, the base's {found!r} "
                f"{list(shared.checkpoint.specs[found].shape)}; resize it to the base's shape"
            )
        else:
            stored[found] = name
    return stored, tuple(sorted(head)), extra


def _grown(spec: TensorSpec, shared: Model, name: str) -> bool:
    """Whether it is a table over the vocabulary, for more tokens than the shared expert knows."""
    ours = shared.checkpoint.specs[name].shape
    return name in shared.layout.vocabulary and spec.shape[0] > ours[0] and spec.shape[1:] == ours[1:]


def require_backbone(name: str, layout: Layout, shared: Model, model_type: str | None) -> None:
    """Refuse a class that is not the shared expert's, nor one with a head of its own on the same backbone.

    Raises:
        MismatchError: saying as what to give the base.
    """
    ours, expected = shared.layout, shared.checkpoint.config.get("model_type")
    if model_type != expected and layout.backbone != ours.backbone:
        raise MismatchError(
            f"expert {name!r} is a {model_type!r} model, the base is {expected!r}; "
            "experts must be fine-tuned from the base"
        )
    if layout.answers and not layout.root and not layout.speaks:
        raise MismatchError(
            f"expert {name!r} is a {layout.cls}, in which no name tells the head from the backbone: heads would be "
            "mixed as if experts shared one; give experts of a class that names its backbone"
        )
    if layout.cls == ours.cls:
        return
    if layout.speaks:
        raise MismatchError(
            f"expert {name!r} is a {layout.cls}, whose output layer all experts share with the base, but not "
            f"all are of that class; give the base and every expert as a {layout.cls}"
        )
    if layout.backbone != ours.backbone:
        raise MismatchError(
            f"expert {name!r} is a {layout.cls} on a {layout.backbone}, the base a {ours.cls}; give the base as what "
            f"{layout.backbone}.from_pretrained and save_pretrained make of it"
        )
