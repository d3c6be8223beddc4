"""Gates any torch module: a fast exact layer where there is one, the exact fall-back for everything else."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from twinmerge.errors import ArtifactError, GateError
from twinmerge.runtime.banks import join_banks, join_readers
from twinmerge.runtime.dry_run import Example
from twinmerge.runtime.fallback import Fallback, Key, join, take, with_values
from twinmerge.runtime.gate import GateContext, GateSlot, without_repeats
from twinmerge.runtime.layers import GatedLayer, GatedLinear
from twinmerge.runtime.merged import MergeCache
from twinmerge.runtime.survey import Way, survey, tensors_of
from twinmerge.tensors.parts import Dense, Part, of_form

Mode = Literal["auto", "factors", "all", "gather", "merge"]
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
        tensors = tensors_of(module)
        self.tensor_names = tuple(dict.fromkeys(first for first, _ in tensors.values()))
        parts = _by_parameter(list(exclusive.values()), tensors)
        dense = {name: of_form(by_expert, Dense).values() for name, by_expert in parts.items()}
        whole = [name for name, found in dense.items() if any(len(part.shape) > 1 for part in found)]
        found = survey(module, parts, example, (*fallback, *whole))
        self.why_slow = found.why_slow
        """Layers that have a fast form and cannot be served by it, and why."""
        self.gated: dict[str, GatedLayer] = {}
        for name, form in found.forms.items():
            own = {leaf: parts[tensor] for leaf, tensor in found.held[name].items() if tensor in parts}
            self.gated[name] = form(module.get_submodule(name), own, len(exclusive), self.slot, name)
        self.module = _exchanged(module, self.gated)
        join_banks(self.gated.values())
        join_readers(self._readers(found.readers))
        self._ways = found.ways
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

        Raises:
            GateError: if the gate has another shape, or is not finite.
        """
        rows = next((len(v) for v in inputs.values() if isinstance(v, Tensor)), 1)
        gate = None if gate is None else self.checked(gate, len(gate))
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

    def checked(self, gate: Tensor, rows: int) -> Tensor:
        """A caller's gate for so many rows, as floats on the module's device.

        Raises:
            GateError: if it has another shape, or is not finite.
        """
        expected = (rows, len(self.expert_names))
        if tuple(gate.shape) != expected:
            raise GateError(f"gate must be (batch, expert) = {expected}, found {tuple(gate.shape)}")
        device = next((tensor.device for tensor in (*self.parameters(), *self.buffers())), gate.device)
        gate = gate.to(device, torch.float32 if not gate.is_floating_point() else gate.dtype)
        if not bool(gate.isfinite().all()):
            raise GateError("gate must be finite, found NaN or Inf")
        return gate

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

    def _readers(self, order: Sequence[tuple[str, int]]) -> list[list[GatedLayer]]:
        """Linear layers with factors, in the order of their calls, those that read one input together."""
        groups: list[list[GatedLayer]] = []
        last = None
        for name, number in order:
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
    exclusive: Sequence[Mapping[str, Part]], tensors: Mapping[str, tuple[str, Tensor]]
) -> dict[str, dict[int, Part]]:
    """Parts by parameter, of tied ones the first, and expert's index, in a float dtype that layers compute with."""
    parts: dict[str, dict[int, Part]] = {}
    for index, own in enumerate(exclusive):
        for name, part in own.items():
            first, tensor = tensors.get(name, (name, None))
            if tensor is None or math.prod(part.shape) != tensor.numel():
                found = "none of that name" if tensor is None else f"one of shape {tuple(tensor.shape)}"
                raise ArtifactError(f"an expert's part {name!r} of shape {part.shape} has no place: there is {found}")
            part = part.to(tensor.dtype) if part.dtype.itemsize == 1 else part
            parts.setdefault(first, {}).setdefault(index, part)
    return parts


def _exchanged(module: nn.Module, gated: Mapping[str, GatedLayer]) -> nn.Module:
    """The module with gated layers in the places of theirs, in every place that one has."""
    by_layer = {id(layer.shared): layer for layer in gated.values()}
    for parent in list(module.modules()):
        for leaf, child in parent._modules.items():
            if id(child) in by_layer and not isinstance(parent, GatedLayer):
                parent._modules[leaf] = by_layer[id(child)]
    return by_layer.get(id(module), module)
