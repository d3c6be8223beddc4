"""Says which way each parameter of a module goes under a gate: a fast exact layer, or the exact fall-back."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from twinmerge.runtime.dry_run import Example, dry_run
from twinmerge.runtime.layers import GatedLayer, form_of

Way = Literal["fast", "fallback"]


@dataclass(frozen=True)
class Survey:
    """What is known of a module's layers."""

    forms: Mapping[str, type[GatedLayer]]
    """Layers that are served fast."""
    held: Mapping[str, Mapping[str, str]]
    """Module -> leaf -> name of the tensor that it holds there."""
    ways: Mapping[str, Way]
    """Tensor -> how it is served."""
    why_slow: Mapping[str, str]
    """Layers that have a fast form and are not served by it, and why, as far as a dry run found it."""
    readers: tuple[tuple[str, int], ...]
    """Layers in the order of their calls, and a number for the input that each read."""


def survey(
    module: nn.Module, names: Collection[str], example: Example | None, fallback: Collection[str] = ()
) -> Survey:
    """Look at the layers that hold some tensors.

    Args:
        module: in eval mode.
        names: of parameters and float buffers that experts change.
        example: makes inputs for the dry run; None leaves everything to the fall-back.
        fallback: those that are left to it whatever is found.
    """
    owners = {id(tensor): first for first, tensor in tensors_of(module).values()}
    held = {name: _held(layer, owners) for name, layer in module.named_modules()}
    forms = {name: form for name, own in held.items() if (form := _form(module.get_submodule(name), own, names))}
    found = dry_run(module, {name: module.get_submodule(name) for name in forms}, example)
    called = {name for layer in forms if layer not in found.uncalled for name in held[layer].values()}
    idle = {layer for layer in found.uncalled if called.issuperset(held[layer].values())}  # tied to one in use
    slow = {*fallback, *(name for layer in found.slow.keys() - idle for name in held[layer].values())}
    forms = _closed(forms, held, slow, names)
    fast = {name for layer in forms for name in held[layer].values()}
    ways: dict[str, Way] = {name: "fast" if name in fast else "fallback" for name in names}
    why = {layer: why for layer, why in found.slow.items() if layer not in forms}
    return Survey(forms, held, ways, why, found.readers)


def tensors_of(module: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Parameters and stored buffers by name, each with the first name that it has: several are tied."""
    stored, first = module.state_dict(keep_vars=True), dict[int, str]()
    for name, tensor in (*module.named_parameters(), *stored.items()):
        first.setdefault(id(tensor), name)
    return {name: (first[id(tensor)], tensor) for name, tensor in stored.items()}


def _held(layer: nn.Module, names: Mapping[int, str]) -> dict[str, str]:
    own = {**layer._parameters, **layer._buffers}
    return {leaf: names[id(tensor)] for leaf, tensor in own.items() if id(tensor) in names}


def _form(layer: nn.Module, own: Mapping[str, str], names: Collection[str]) -> type[GatedLayer] | None:
    """The gated form of a layer, None where none serves all that experts change of it."""
    changed = {leaf for leaf, name in own.items() if name in names}
    form = form_of(layer) if changed else None
    return form if form is not None and changed <= form.leaves else None


def _closed(
    forms: Mapping[str, type[GatedLayer]],
    held: Mapping[str, Mapping[str, str]],
    slow: set[str],
    names: Collection[str],
) -> dict[str, type[GatedLayer]]:
    """Layers all of whose parameters are served fast wherever else they are: the tied, and those of one layer."""
    kept = dict(forms)
    slow = slow | {name for layer, own in held.items() if layer not in kept for name in own.values()}
    while gone := [layer for layer in kept if any(name in slow and name in names for name in held[layer].values())]:
        for layer in gone:
            del kept[layer]
            slow |= set(held[layer].values())
    return kept
