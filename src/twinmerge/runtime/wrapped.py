"""A twin around any torch module: gates, heads of the experts' own, and a router that looks at one of its layers."""

import copy
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twinmerge.errors import ArtifactError, GateError
from twinmerge.files.strict_json import read_json
from twinmerge.routing.router import Router, Stored
from twinmerge.routing.store import load_router
from twinmerge.runtime.fallback import take, with_values
from twinmerge.runtime.gate import keep_large
from twinmerge.runtime.module import Mode, TwinModule
from twinmerge.tensors.parts import Part
from twinmerge.twin.artifact import MODULE, TwinArtifact
from twinmerge.twin.features import Layers

LAST = Layers("last")
_DROP_BELOW = 0.02


@dataclass(frozen=True)
class Shape:
    """What a module is told of one of its inputs.

    Attributes:
        shape: of a row.
        dtype: torch's name for it.
    """

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Called:
    """How a module is called, as its twin's folder keeps it.

    Attributes:
        inputs: by the name of its forward's argument.
        features: the submodule whose output the router looks at, "" for the module's own; None without a router.
        heads: of the experts' own, what the names of their tensors begin with.
    """

    inputs: Mapping[str, Shape]
    features: str | None = None
    heads: tuple[str, ...] = ()

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor], features: str | None, heads: Iterable[str]) -> "Called":
        """As some rows say it."""
        shapes = {k: Shape(tuple(v.shape[1:]), str(v.dtype).removeprefix("torch.")) for k, v in inputs.items()}
        return cls(shapes, features, tuple(heads))

    @classmethod
    def read(cls, folder: Path) -> "Called":
        """What `write` wrote.

        Raises:
            ArtifactError: if the twin is not of a plain module.
        """
        if not (folder / MODULE).is_file():
            raise ArtifactError(f"{folder} is a twin of a transformers model; use TwinModel.from_pretrained")
        content = read_json(folder / MODULE)
        inputs = {name: Shape(tuple(one["shape"]), one["dtype"]) for name, one in content["inputs"].items()}
        return cls(inputs, content["features"], tuple(content["heads"]))

    def write(self, folder: Path) -> None:
        """Keep it in a twin's folder."""
        inputs = {name: {"shape": list(one.shape), "dtype": one.dtype} for name, one in self.inputs.items()}
        content = {"inputs": inputs, "features": self.features, "heads": list(self.heads)}
        (folder / MODULE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def example(self, rows: int) -> dict[str, Tensor]:
        """So many made-up rows; whole numbers are 0 and 1."""
        found = {}
        for name, one in self.inputs.items():
            dtype = getattr(torch, one.dtype)
            drawn = torch.randn(rows, *one.shape, generator=torch.Generator().manual_seed(0))
            found[name] = drawn.to(dtype) if dtype.is_floating_point else (drawn > 0).to(dtype)
        return found

    def is_head(self, name: str) -> bool:
        """Whether a tensor is of a head."""
        return any(name == head or name.startswith(f"{head}.") for head in self.heads)


@dataclass(frozen=True)
class WrappedOutput:
    """What a wrapped module says of a batch.

    Attributes:
        outputs: the module's, where experts share all of it; else one a row, by the head of its expert.
        gate: (batch, expert), what was mixed.
        expert: of every row.
        probability: (batch, expert), calibrated; None if the gate was given.
        fallback: (batch,) bool, rows unlike every expert's inputs; None if the gate was given.
    """

    outputs: Any
    gate: Tensor
    expert: list[str]
    probability: Tensor | None = None
    fallback: Tensor | None = None


class Wrapped(nn.Module):
    """A module whose every row runs with the weights of its own gate; a call changes nothing of it."""

    def __init__(
        self,
        module: nn.Module,
        exclusive: Mapping[str, Mapping[str, Part]],
        called: Called,
        *,
        heads: Mapping[str, Mapping[str, Tensor]] | None = None,
        router: Router | None = None,
    ) -> None:
        """Gate a module; `wrap` is the usual way in.

        Args:
            module: the shared expert, taken over.
            exclusive: expert -> name of a parameter or float buffer -> exclusive part; the order is the gate's.
            called: how it is called.
            heads: expert -> name -> tensor that is the expert's own, of any shape.
            router: in front; without one every call needs a gate or an expert.
        """
        super().__init__()
        self.called, self.router = called, router
        self.arguments = tuple(inspect.signature(module.forward).parameters)
        self.expert_names = tuple(exclusive)
        self.twin = TwinModule(module.eval(), exclusive, example=called.example)
        self.heads = nn.ModuleDict({name: _Tensors(own) for name, own in (heads or {}).items()})
        if called.features is not None:
            found = self.twin.module.get_submodule(called.features)
            found.register_forward_hook(lambda _, __, output: self._show(output))
        self.eval()
        self.requires_grad_(False)

    def forward(
        self,
        *args: Any,
        gate: Tensor | None = None,
        expert: str | Sequence[str] | None = None,
        mode: Mode = "auto",
        **inputs: Any,
    ) -> WrappedOutput:
        """Answer a batch; every row is mixed by its own gate.

        Args:
            *args: the module's, (batch, ...) each.
            gate: (batch, expert), the caller's own; None asks the router, or takes `expert` alone.
            expert: whose head answers, one name or one a row; None takes the gate's largest.
            mode: how gated layers compute (`TwinModule.run`), the same result each way.
            **inputs: the module's, by name.

        Raises:
            GateError: if the gate has another shape, is not finite, an expert is unknown, or nothing says who answers.
        """
        with torch.inference_mode():
            given = {**dict(zip(self.arguments, args, strict=False)), **inputs}
            rows = next((len(v) for v in given.values() if isinstance(v, Tensor)), 0)
            routing = None
            if gate is None and expert is None:
                routing = self._required_router().route(Stored({LAST: self.features(**given)}))
                gate = keep_large(routing.gate, _DROP_BELOW)
                names = [self.expert_names[index] for index in routing.expert.tolist()]
            else:
                names = [] if expert is None else self._names(expert, rows)
                gate = self._one_hot(names) if gate is None else self.twin.checked(gate, rows)
                names = names or [self.expert_names[index] for index in gate.argmax(dim=1).tolist()]
            outputs = self._answered(given, gate, names, mode, rows)
        if routing is None:
            return WrappedOutput(outputs, gate, names)
        return WrappedOutput(outputs, gate, names, routing.probability, routing.fallback)

    @torch.inference_mode()
    def features(self, *args: Any, **inputs: Any) -> Tensor:
        """What the router sees: the output of its layer in the shared expert, averaged over positions.

        Returns:
            (batch, feature), float32.

        Raises:
            GateError: if there is no such layer.
        """
        if self.called.features is None:
            raise GateError("this twin has no router; give a gate or an expert")
        given, seen = {**dict(zip(self.arguments, args, strict=False)), **inputs}, _Seen()
        rows = next((len(v) for v in given.values() if isinstance(v, Tensor)), 1)
        with self.twin.slot.watch(seen):
            self.twin.run(_call, None, given, tokens=rows)
        return pooled(seen.output)

    def state_for(self, gate: Tensor | Sequence[float], expert: str | None = None) -> dict[str, Tensor]:
        """A plain state dict of the module for one gate (expert,), with the head of an expert, else of the largest."""
        weights = self.twin.checked(torch.as_tensor(gate)[None], 1)[0]
        name = expert or self.expert_names[int(weights.argmax())]
        return {**self.twin.state_for(weights), **self._head(name)}

    def paths(self) -> dict[str, Any]:
        """How each parameter that an expert changed is served: `fast`, or by the fall-back, a pass a distinct gate."""
        return self.twin.paths()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or convert; the router stays in float32."""
        router, self.router = self.router, None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if router is not None:
            self.router = router.to(next(self.twin.module.parameters()).device)
        return self

    def _answered(self, inputs: Mapping[str, Any], gate: Tensor, names: Sequence[str], mode: Mode, rows: int) -> Any:
        """The module's outputs; with heads, a pass for the rows of each expert."""
        if not self.heads:
            return self.twin.run(_call, gate, inputs, tokens=rows, mode=mode)
        found: list[Any] = [None] * rows
        for name in sorted(set(names)):
            members = [row for row, own in enumerate(names) if own == name]
            picked = take(inputs, members, rows)
            if picked is None:
                raise GateError("every input must have one row for each gate")
            call = _WithHead(self.twin, self._head(name))
            outputs = self.twin.run(call, gate[members], picked, tokens=len(members), mode=mode)
            for row, value in zip(members, outputs, strict=True):
                found[row] = value
        return found

    def _head(self, name: str) -> dict[str, Tensor]:
        """The tensors that are an expert's own."""
        own: Any = self.heads[name] if self.heads else _Tensors({})
        return dict(own.items())

    def _show(self, output: Any) -> None:
        if self.twin.slot.probe is not None:
            self.twin.slot.probe.output = output

    def _one_hot(self, names: Sequence[str]) -> Tensor:
        columns = torch.tensor([self.expert_names.index(name) for name in names])
        device = next((t.device for t in (*self.twin.parameters(), *self.twin.buffers())), columns.device)
        return nn.functional.one_hot(columns, len(self.expert_names)).float().to(device)

    def _names(self, expert: str | Sequence[str], rows: int) -> list[str]:
        names = [expert] * rows if isinstance(expert, str) else list(expert)
        if unknown := [name for name in names if name not in self.expert_names]:
            raise GateError(f"unknown expert {unknown[0]!r}; this twin has {', '.join(self.expert_names)}")
        if len(names) != rows:
            raise GateError(f"there must be one expert or one a row, found {len(names)} for {rows} rows")
        return names

    def _required_router(self) -> Router:
        if self.router is None:
            raise GateError("this twin has no router; give a gate or an expert")
        return self.router


def wrap(module: nn.Module, twin: Path | str) -> Wrapped:
    """Put a twin of a plain module around a module of the same class.

    Args:
        module: of the class that the twin was built of; it is copied, and its weights are not used.
        twin: folder that `build_from_state_dicts` wrote.

    Returns:
        In eval mode, in the dtype of the stored weights; move it with `.to`.

    Raises:
        ArtifactError: if the twin is of another module.
    """
    artifact = TwinArtifact.open(twin)
    called, made = Called.read(artifact.path), copy.deepcopy(module)
    state = {name: artifact.shared.read(name) for name in artifact.shared.specs}
    result = made.load_state_dict(state, strict=False, assign=True)
    lacking = [name for name in result.missing_keys if not called.is_head(name)]
    if odd := [*lacking, *result.unexpected_keys]:
        raise ArtifactError(f"{artifact.path} is a twin of another module: {odd[0]!r} is not in both")
    heads = {name: head[1] for name in artifact.expert_names if (head := artifact.head(name))}
    exclusive = {name: artifact.exclusive(name) for name in artifact.expert_names}
    router = load_router(artifact.path / "router") if artifact.manifest.router is not None else None
    return Wrapped(made, exclusive, called, heads=heads, router=router)


def pooled(output: Any) -> Tensor:
    """(batch, feature), float32: means over the positions of (batch, seq, feature) or (batch, feature, h, w).

    Raises:
        GateError: if it is no tensor of rows.
    """
    if not isinstance(output, Tensor) or output.ndim < 2:
        raise GateError("the router's layer must give one tensor (batch, ...); name another as features")
    values = output.float()
    if values.ndim == 3:
        return values.mean(dim=1)
    return values.flatten(2).mean(dim=2) if values.ndim > 3 else values


class _Seen:
    """Keeps what a layer gave."""

    output: Any = None


class _Tensors(nn.Module):
    """Named tensors, whose names may hold dots."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(tensors)
        for index, tensor in enumerate(tensors.values()):
            self.register_buffer(str(index), tensor)

    def items(self) -> Iterable[tuple[str, Tensor]]:
        """Names and tensors."""
        return ((name, getattr(self, str(index))) for index, name in enumerate(self.names))


class _WithHead:
    """A call of a module with some of its tensors exchanged; the module is not touched."""

    def __init__(self, twin: TwinModule, tensors: Mapping[str, Tensor]) -> None:
        self.twin, self.tensors = twin, tensors

    def __call__(self, module: nn.Module, inputs: Mapping[str, Any]) -> Any:
        held = module.state_dict(keep_vars=True)
        values = {id(held[name]): value for name, value in self.tensors.items()}
        return with_values(module, values, self.twin.slot)(**inputs)


def _call(module: nn.Module, inputs: Mapping[str, Any]) -> Any:
    return module(**inputs)
