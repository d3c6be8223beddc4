"""Runs a model on a few made-up rows to see which of its layers a gate can serve row by row.

Two runs, of two rows and of three, in each of which one row is not a number: a layer whose input is NaN where that row
is, and nowhere else, sees the batch's rows. Found so, not by class names: layers whose weight other code reads, layers
whose rows are another thing's (tables of positions, packed images, tokens sorted by experts), and layers that read one
input, which share a projection.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from twinmerge.runtime.layers.layer import FAULTS

Example = Callable[[int], Mapping[str, Any]]
"""Inputs of so many rows, of different lengths where a model takes such, as keyword arguments."""
_MARKED = 1
"""The row that is not a number."""


@dataclass(frozen=True)
class Findings:
    """What a dry run found."""

    slow: Mapping[str, str]
    """Layers that cannot be served row by row, and why."""
    uncalled: frozenset[str] = frozenset()
    """Those of them that no run called."""
    readers: tuple[tuple[str, int], ...] = ()
    """Layers in the order of their calls, and a number for the input that each read."""


def dry_run(module: nn.Module, layers: Mapping[str, nn.Module], example: Example | None) -> Findings:
    """Look at how a module calls some of its layers.

    Args:
        module: in eval mode; unchanged afterwards.
        layers: by name.
        example: None, or a run that fails, leaves every layer slow: nothing is known of them.
    """
    if example is None or not layers:
        return Findings(dict.fromkeys(layers, "there are no example inputs"))
    try:
        two, three = (_watched(module, layers, example(count)) for count in (2, 3))
    except (*FAULTS, AssertionError) as error:
        return Findings(dict.fromkeys(layers, f"a run on example inputs ends in {type(error).__name__}: {error}"))
    if not three.marks:
        return Findings(dict.fromkeys(layers, "no layer sees the rows of example inputs"))
    slow = {name: why for name in layers if (why := _why_slow(name, two, three))}
    return Findings(slow, frozenset(slow.keys() - two.calls.keys() - three.calls.keys()), tuple(three.order))


@dataclass(frozen=True)
class _Call:
    """One call of a layer."""

    rows: int
    one_input: bool
    marked: Tensor | None
    """(rows,), where the marked row is; None where the input holds nothing of it."""
    for_all: bool
    """Indices (1, ...), whose rows the batch shares."""


@dataclass
class _Watch:
    calls: dict[str, list[_Call]] = field(default_factory=dict)
    order: list[tuple[str, int]] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    """Layers whose tensors others than the layer itself computed with."""
    inputs: list[Tensor] = field(default_factory=list)
    """Kept, so that no two have one id."""
    marks: int = 0


def _why_slow(name: str, two: _Watch, three: _Watch) -> str | None:
    pairs = list(zip(two.calls.get(name, []), three.calls.get(name, []), strict=False))
    if name in two.read | three.read:
        return "other code reads its weights"
    if not pairs or len(two.calls[name]) != len(three.calls[name]):
        return "it is not called for every batch"
    for a, b in pairs:
        if not (a.one_input and b.one_input):
            return "it is not called with one input alone"
        if a.for_all and b.for_all:
            continue
        each, rest = divmod(a.rows, 2)
        if rest or (each, 0) != divmod(b.rows, 3):
            return "its rows are not the batch's"
        for call in (a, b):
            if call.marked is None and each > 1:
                return "its rows may not be the batch's"
            marked = [] if call.marked is None else call.marked.tolist()
            if any(marked[: each * _MARKED] + marked[each * (_MARKED + 1) :]):
                return "its rows are not the batch's in their order"
    return None


def _watched(module: nn.Module, layers: Mapping[str, nn.Module], inputs: Mapping[str, Any]) -> _Watch:
    """Run a module on inputs, one of whose rows is not a number."""
    watch = _Watch()
    ids = [v for k, v in inputs.items() if isinstance(v, Tensor) and not v.is_floating_point() and "mask" not in k]
    given = {k: _spoilt(v) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    hooks = [m.register_forward_hook(partial(_spoil_rows_of, ids), with_kwargs=True) for m in module.modules()]
    for name, layer in layers.items():
        hooks.append(layer.register_forward_pre_hook(partial(_enter, watch, name, ids), with_kwargs=True))
        hooks.append(layer.register_forward_hook(partial(_leave, watch), always_call=True))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _guarded(watch, layers):
            warnings.simplefilter("ignore")
            module(**given)
    finally:
        for hook in hooks:
            hook.remove()
    return watch


def _enter(watch: _Watch, name: str, ids: list[Tensor], layer: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    watch.running.append(name)
    given = [*args, *kwargs.values()]
    x = given[0] if given else None
    if not isinstance(x, Tensor) or not x.ndim:
        watch.calls.setdefault(name, []).append(_Call(0, False, None, False))
        return
    watch.inputs.append(x)
    watch.order.append((name, id(x)))
    if x.is_floating_point():
        marked = x.isnan().reshape(len(x), -1).any(dim=1)
    else:
        marked = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        marked[_MARKED : _MARKED + 1] = any(_same(x, one) for one in ids)
    holds = bool(marked.any())
    watch.marks += holds
    for_all = len(x) == 1 and x.ndim > 1 and not x.is_floating_point()
    call = _Call(len(x), len(args) == 1 and not kwargs, marked if holds else None, for_all)
    watch.calls.setdefault(name, []).append(call)


def _leave(watch: _Watch, layer: nn.Module, args: Any, output: Any) -> None:
    watch.running.pop()


def _spoil_rows_of(ids: list[Tensor], module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
    """What a module makes of the inputs' indices is not a number in the marked row."""
    given = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
    if not isinstance(output, Tensor) or not any(_same(x, one) for x in given for one in ids):
        return None
    return _spoilt(output) if output.is_floating_point() and output.ndim and len(output) == len(ids[0]) else None


def _spoilt(x: Tensor) -> Tensor:
    x = x.clone()
    x[_MARKED] = float("nan")
    return x


def _same(x: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, or views of one."""
    return x.dtype == other.dtype and x.numel() == other.numel() and x.data_ptr() == other.data_ptr()


# ---- who reads a layer's tensors

_OF_NO_VALUE = {"size", "dim", "numel", "element_size", "is_floating_point", "is_contiguous", "stride", "type_as"}


class _Guarded(Tensor):
    """A tensor that tells when something is computed with it; to ask for its dtype, device or shape is nothing."""

    noticed: Callable[[], None]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        asked = function.__name__ == "__get__" and not isinstance(result, Tensor)
        if not asked and function.__name__ not in _OF_NO_VALUE:
            for value in _flat([args, kwargs or {}]):
                if isinstance(value, _Guarded):
                    value.noticed()
        return result


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list | tuple):
        for value in values:
            yield from _flat(value)
    else:
        yield values


@contextmanager
def _guarded(watch: _Watch, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put guarded tensors in the places of the layers' own for a while."""
    places: list[tuple[str, Any]] = [(n, held) for n, m in layers.items() for held in (m._parameters, m._buffers)]
    before = [dict(held) for _, held in places]

    def notice(name: str) -> None:
        if not watch.running or watch.running[-1] != name:
            watch.read.add(name)

    try:
        for name, held in places:
            for leaf, value in held.items():
                if value is not None:
                    guarded: Any = torch.Tensor._make_subclass(_Guarded, value.detach())
                    guarded.noticed = partial(notice, name)
                    guarded._is_param = isinstance(value, nn.Parameter)
                    held[leaf] = guarded
        yield
    finally:
        for (_, held), values in zip(places, before, strict=True):
            held.update(values)
