"""Says what each parameter of a transformers model is, and which way it goes under a gate; needs no weights."""

from collections.abc import Collection
from functools import partial
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from twinmerge.hf.example import example_inputs
from twinmerge.hf.loading import skeleton
from twinmerge.runtime.layers import GatedLayer, form_of
from twinmerge.runtime.survey import survey
from twinmerge.twin.plan import Kind


def parameter_kinds(source: Path | nn.Module) -> dict[str, Kind]:
    """What every parameter and stored buffer is.

    Args:
        source: a model folder, of which no weight is read, or a module, a `loading.skeleton` perhaps.

    Raises:
        MismatchError: if the folder's class is unknown to transformers.
    """
    model = skeleton(source) if isinstance(source, Path) else source
    stored = model.state_dict(keep_vars=True)
    kinds: dict[str, Kind] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        form = form_of(module)
        for leaf in (*module._parameters, *module._buffers):
            name = f"{module_name}.{leaf}" if module_name else leaf
            if name in stored:
                kinds[name] = _kind(module, leaf, form, stored[name].ndim)
    return {name: kinds[name] if tensor.is_floating_point() else "static" for name, tensor in stored.items()}


def fallback_of(model: PreTrainedModel, names: Collection[str]) -> tuple[str, ...]:
    """Of the parameters that experts change, those that no fast gated layer serves."""
    ways = survey(model, names, partial(example_inputs, model)).ways
    return tuple(sorted(name for name, way in ways.items() if way == "fallback"))


def _kind(module: nn.Module, leaf: str, form: type[GatedLayer] | None, axes: int) -> Kind:
    if form is not None and leaf in form.leaves:
        return form.kind if leaf == form.matrix else "vector"
    if isinstance(module, nn.Embedding) and leaf == "weight":
        return "table"
    return "matrix" if axes > 1 else "values"
