"""Gates any torch module: a fast exact layer where there is one, the exact fall-back for everything else."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from twinmerge.errors import ArtifactError
from twinmerge.runtime.banks import join_banks, join_readers
from twinmerge.runtime.dry_run import Example, Findings, dry_run
from twinmerge.runtime.fallback import Fallback, Key, join, take, with_values
from twinmerge.runtime.gate import GateContext, GateSlot, without_repeats
from twinmerge.runtime.layers import GatedLayer, GatedLinear, form_of
from twinmerge.runtime.merged import MergeCache
from twinmerge.tensors.parts import Dense, Part, of_form

Mode = Literal["auto", "factors", "all", "gather", "merge"]
Way = Literal["fast", "fallback"]
Call = Callable[[nn.Module, Mapping[str, Any]], Any]
"""What is asked of the module, or of one like it with merged values, on inputs."""


class TwinModule(nn.Module):
    """A module whose every row of a batch runs with the weights of its own gate; a call changes nothing of it.

    Example:
        >>> shared = nn.Sequential(nn.Linear(2, 1, bias=False)).eval()
        >>> add_one = {"0.weight": Dense(torch.ones(1, 2))}
        >>> twin = TwinModule(shared, {"a": add_one, "b": {}})
        >>> gate, x = torch.eye(2), torch.ones(2, 2)
        >>> bool(torch.allclose(twin(gate, input=x) - shared(x), torch.tensor([[2.0], [0.0]])))
        True
    """

    def __init__(
        self,
        module: nn.Module,
        exclusive: Mapping[str, Mapping[str, Part]],
        *,
        example: Example | None = None,
        fallback: Sequence[str] = (),
        merge_bytes: int = 2**30,
    ) -> None:
        """Take over a module in eval mode; layers that have parts and a fast form are exchanged.

        Args:
            module: the shared expert.
            exclusive: expert -> name of a parameter or float buffer -> exclusive part; the order is the gate's.
            example: makes inputs of so many rows, for the dry run that finds out which layers see the batch's rows;
                None leaves everything to the fall-back.
            fallback: parameters that are left to it whatever the dry run finds.
            merge_bytes: what merged weights may take (`merged.MergeCache`).

        Raises:
            ArtifactError: if a part belongs to nothing in the module, or does not fit it.
        """
        super().__init__()
        self.expert_names = tuple(exclusive)
        self.slot = GateSlot()
        stored = module.state_dict(keep_vars=True)
        buffers = {name for name, _ in module.named_buffers() if name in stored}
        tensors = dict(module.named_parameters()) | {name: stored[name] for name in stored if name in buffers}
        self.tensor_names = tuple(tensors)
        names = {id(tensor): name for name, tensor in tensors.items()}
        parts = _by_parameter(list(exclusive.values()), {**stored, **tensors}, names)
        held = {module_name: _held(layer, names) for module_name, layer in module.named_modules()}
        forms = {n: f for n, own in held.items() if (f := _form(module.get_submodule(n), own, parts)) is not None}
        found = dry_run(module, {name: module.get_submodule(name) for name in forms}, example if forms else None)
        called = {name for layer in forms if layer not in found.uncalled for name in held[layer].values()}
        idle = {layer for layer in found.uncalled if called.issuperset(held[layer].values())}  # tied to one in use
        slow = {*fallback, *(name for layer in found.slow.keys() - idle for name in held[layer].values())}
        forms = _closed(forms, held, slow, parts)
        self.why_slow = {layer: why for layer, why in found.slow.items() if layer not in forms}
        """Layers that have a fast form and cannot be served by it, and why."""
        self.gated: dict[str, GatedLayer] = {}
        for name, form in forms.items():
            own = {leaf: parts[tensor] for leaf, tensor in held[name].items() if tensor in parts}
            self.gated[name] = form(module.get_submodule(name), own, len(exclusive), self.slot, name)
        self.module = _exchanged(module, self.gated)
        join_banks(self.gated.values())
        join_readers(self._readers(found))
        fast = {tensor for name in forms for tensor in held[name].values()}
        self._ways: dict[str, Way] = {name: "fast" if name in fast else "fallback" for name in parts}
        self.fallback = Fallback({name: parts[name] for name, way in self._ways.items() if way == "fallback"})
        linear = {n: layer for n, layer in self.gated.items() if isinstance(layer, GatedLinear) and layer.has_factors}
        self.merged = MergeCache(linear, merge_bytes)
        self.eval()
        self.requires_grad_(False)

    def paths(self) -> dict[str, Way]:
        """How each parameter that an expert changed is served: `fast`, or by the fall-back, a pass a distinct gate."""
        return dict(self._ways)

    @torch.inference_mode()
    def forward(self, gate: Tensor | None, mode: Mode = "auto", **inputs: Any) -> Any:
        """Run a batch; every row by its own gate.

        Args:
            gate: (batch, expert), None for the shared expert alone.
            mode: how gated layers compute, see `run`.
            **inputs: the module's, (batch, ...) each.
        """
        rows = next((len(v) for v in inputs.values() if isinstance(v, Tensor)), 1)
        return self.run(lambda module, own: module(**own), gate, inputs, tokens=rows, mode=mode)

    def run(
        self,
        call: Call,
        gate: Tensor | None,
        inputs: Mapping[str, Any],
        *,
        tokens: int,
        calls: int = 1,
        mode: Mode = "auto",
        pad: int | None = None,
    ) -> Any:
        """Ask something of the module under a gate.

        Args:
            call: given the module and inputs; where the fall-back is needed, once for every distinct gate.
            gate: (batch, expert), None for the shared expert alone.
            inputs: as the caller has them.
            tokens: how many pass through the layers, for the cost models.
            calls: of the module that are to be expected, such as steps of a generation.
            mode: how gated layers compute, the same result each way. `all`: the ranks of all experts in use for every
                row; `gather`: each row's own ranks; `merge`: merged weights, one set for every different gate;
                `auto`: the cheapest by the cost models of `paths` and `merged`; `factors`: the same, but never merged.
            pad: fills up outputs (row, length) that differ in length from gate to gate.
        """
        groups = self.fallback.groups(gate) if gate is not None and self.fallback.names else {}
        if gate is None or len(groups) < 2:
            module = self._merged_module(next(iter(groups))) if groups else self.module
            with self.slot.use(None if gate is None else self.context(gate, tokens, calls, mode)):
                return call(module, inputs)
        outputs, whole = [], take(inputs, [], len(gate)) is None
        for key, rows in groups.items():
            own = inputs if whole else take(inputs, rows, len(gate)) or {}
            of_rows = gate if whole else gate[rows]
            with self.slot.use(self.context(of_rows, max(1, tokens * len(of_rows) // len(gate)), calls, mode)):
                outputs.append(call(self._merged_module(key), own))
        return join(outputs, list(groups.values()), whole, pad)

    def context(self, gate: Tensor, tokens: int, calls: int = 1, mode: Mode = "auto") -> GateContext:
        """A gate as the layers take it."""
        gate = without_repeats(gate)
        merged = None
        if mode == "merge" or (mode == "auto" and len(gate) == 1 and self.merged.pays(tokens, calls)):
            rows: dict[tuple[float, ...], list[int]] = {}
            for index, row in enumerate(gate.tolist()):
                rows.setdefault(tuple(row), []).append(index)
            merged = [(own, self.merged.weights(row, gate[own[0]])) for row, own in rows.items()]
        return GateContext(gate, path=mode if mode in ("all", "gather") else None, keep=calls > 1, merged=merged)

    @torch.no_grad()
    def state_for(self, gate: Tensor) -> dict[str, Tensor]:
        """All values for one gate (expert,), by the module's names; copies."""
        state = {name: self._tensor(name).detach().clone() for name in self.tensor_names}
        for module, layer in self.gated.items():
            for leaf, value in layer.materialized(gate).items():
                state[f"{module}.{leaf}" if module else leaf] = value
        key = tuple(gate[self.fallback.experts].tolist())
        return state | self.fallback.merged(state, key)

    def _merged_module(self, key: Key) -> nn.Module:
        """The module with what goes by the fall-back merged for a gate."""
        if not any(key):
            return self.module

        def make() -> nn.Module:
            shared = {name: self._tensor(name) for name in self.fallback.names}
            merged = self.fallback.merged(shared, key)
            return with_values(self.module, {id(shared[name]): merged[name] for name in merged}, self.slot)

        size = sum(self._tensor(name).nbytes for name in self.fallback.names)
        made: nn.Module = self.merged.kept(("module", key), make, size)
        return made

    def _tensor(self, name: str) -> Tensor:
        parent, _, leaf = name.rpartition(".")
        found: Tensor = getattr(self.module.get_submodule(parent), leaf)
        return found

    def _readers(self, found: Findings) -> list[list[GatedLayer]]:
        """Linear layers with factors, in the order of their calls, those that read one input together."""
        groups: list[list[GatedLayer]] = []
        last = None
        for name, number in found.readers:
            layer = self.gated.get(name)
            if isinstance(layer, GatedLinear) and layer.has_factors:
                groups = [*groups[:-1], [*groups[-1], layer]] if number == last else [*groups, [layer]]
                last = number
        return groups

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or convert; what was merged would be stale."""
        self.merged.clear()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def _by_parameter(
    exclusive: Sequence[Mapping[str, Part]], tensors: Mapping[str, Tensor], names: Mapping[int, str]
) -> dict[str, dict[int, Part]]:
    """Parts by parameter and expert's index, in a float dtype that layers compute with."""
    parts: dict[str, dict[int, Part]] = {}
    for index, own in enumerate(exclusive):
        for name, part in own.items():
            tensor = tensors.get(name)
            if tensor is None or id(tensor) not in names or math.prod(part.shape) != tensor.numel():
                found = "none of that name" if tensor is None else f"one of shape {tuple(tensor.shape)}"
                raise ArtifactError(f"an expert's part {name!r} of shape {part.shape} has no place: there is {found}")
            part = part.to(tensor.dtype) if part.dtype.itemsize == 1 else part
            parts.setdefault(names[id(tensor)], {}).setdefault(index, part)
    return parts


def _held(layer: nn.Module, names: Mapping[int, str]) -> dict[str, str]:
    """What a module itself holds: leaf -> name of the tensor, the first one's where several are tied."""
    own = {**layer._parameters, **layer._buffers}
    return {leaf: names[id(tensor)] for leaf, tensor in own.items() if id(tensor) in names}


def _form(layer: nn.Module, own: Mapping[str, str], parts: Mapping[str, Mapping[int, Part]]) -> type[GatedLayer] | None:
    """The gated form of a layer, None where none serves all its parts."""
    with_parts = {leaf: parts[name] for leaf, name in own.items() if name in parts}
    form = form_of(layer) if with_parts else None
    if form is None or not set(with_parts) <= form.leaves:
        return None
    whole = [leaf for leaf, by_expert in with_parts.items() if of_form(by_expert, Dense)]
    flat = all(getattr(layer, leaf).ndim == 1 for leaf in whole)
    return form if flat else None


def _closed(
    forms: Mapping[str, type[GatedLayer]],
    held: Mapping[str, Mapping[str, str]],
    slow: set[str],
    parts: Mapping[str, Any],
) -> dict[str, type[GatedLayer]]:
    """Layers all of whose parameters are served fast wherever else they are: the tied, and those of one layer."""
    kept = dict(forms)
    slow = slow | {name for layer, own in held.items() if layer not in kept for name in own.values()}
    while gone := [layer for layer in kept if any(name in slow and name in parts for name in held[layer].values())]:
        for layer in gone:
            del kept[layer]
            slow |= set(held[layer].values())
    return kept


def _exchanged(module: nn.Module, gated: Mapping[str, GatedLayer]) -> nn.Module:
    """The module with gated layers in the places of theirs, in every place that one has."""
    by_layer = {id(layer.shared): layer for layer in gated.values()}
    for parent in list(module.modules()):
        for leaf, child in parent._modules.items():
            if id(child) in by_layer and not isinstance(parent, GatedLayer):
                parent._modules[leaf] = by_layer[id(child)]
    return by_layer.get(id(module), module)
