"""Knows transformers: a model with its layers exchanged for gated ones, heads per expert, one router in front."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from twinmerge.errors import ArtifactError, GateError, MismatchError
from twinmerge.runtime.gating import GateContext, GateSlot, keep_large
from twinmerge.runtime.layers import LAYERS, GatedLayer, GatedLinear, join_banks, join_readers
from twinmerge.runtime.merged import MergeCache
from twinmerge.tensors.checkpoint import Checkpoint
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.twin.exclusive import Exclusive
from twinmerge.twin.ngrams import token_ids
from twinmerge.twin.plan import Kind
from twinmerge.twin.recipe import RouterSettings
from twinmerge.twin.router import Router, Routing

Mode = Literal["auto", "factors", "all", "gather", "merge"]
_NEW_TOKENS = 20
"""What transformers' generate makes when nobody says how many."""


@dataclass
class TwinOutput(ModelOutput):
    """What a twin says of a batch.

    Attributes:
        logits: one tensor where all experts share the output layer (causal LM); else a list of (num_labels,) tensors,
            one a row, each by the head of its row's expert; None for a plain encoder.
        gate: (batch, expert), what was mixed.
        expert: the expert of every row, whose head answered.
        fallback: (batch,) bool, rows unlike every expert's inputs; None if the gate was given.
        last_hidden_state: (batch, seq, hidden) of the gated backbone; None for a causal LM.
    """

    logits: Any = None
    gate: Tensor = None  # type: ignore[assignment]  # always given; ModelOutput allows one field without default
    expert: Any = None
    fallback: Tensor | None = None
    last_hidden_state: Tensor | None = None


class TwinModel(nn.Module):
    """A twin as a torch module: routes each row, mixes the experts for it, answers with its expert's head.

    Example:
        >>> model = TwinModel.from_pretrained("twin")              # doctest: +SKIP
        >>> out = model(**model.tokenizer(["free prize!"], return_tensors="pt"))   # doctest: +SKIP
        >>> out.expert                                             # doctest: +SKIP
        ['sms']
    """

    router: Router | None

    def __init__(
        self,
        backbone: PreTrainedModel,
        exclusive: Mapping[str, Mapping[str, Exclusive]],
        *,
        kinds: Mapping[str, Kind],
        heads: Mapping[str, PreTrainedModel] | None = None,
        router: Router | None = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        mode: Mode = "auto",
        drop_below: float = 0.02,
        merge_bytes: int = 2**30,
    ) -> None:
        """Exchange the layers of a shared expert; `from_pretrained` is the usual way in.

        Args:
            backbone: the shared expert, taken over.
            exclusive: expert -> parameter name -> exclusive part; the order is the gate's.
            kinds: parameter name -> what its layer is.
            heads: expert -> a whole model of the expert's class without a backbone; none for a shared output.
            router: in front; without one every call needs a gate or an expert.
            tokenizer: of the shared expert.
            max_length: tokens an input is cut at.
            mode: how gated layers compute, the same result each way. `all`: the ranks of all experts in use for every
                row; `gather`: each row's own ranks; `merge`: merged weights, one set for every different gate;
                `auto`: the cheapest by the cost models of `gating` and `merged`; `factors`: the same, but never merged
                weights, so that what was asked before changes no bit.
            drop_below: gates of the router under this are dropped (`gating.keep_large` says what that can change); a
                caller's gates are used as they are.
            merge_bytes: what merged weights may take (`merged.MergeCache`).
        """
        super().__init__()
        self.mode: Mode = mode
        self.drop_below = drop_below
        self.expert_names = tuple(exclusive)
        self.slot = GateSlot()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.parameter_names = tuple(name for name, _ in backbone.named_parameters())
        stored = backbone.state_dict()
        self.buffer_names = tuple(name for name, _ in backbone.named_buffers() if name in stored)
        self.gated: dict[str, GatedLayer] = _exchange_layers(backbone, list(exclusive.values()), kinds, self.slot)
        join_banks(self.gated.values())
        self._watched = False
        linear = {n: layer for n, layer in self.gated.items() if isinstance(layer, GatedLinear) and layer.has_factors}
        self.merged = MergeCache(linear, merge_bytes)
        self.backbone = backbone
        self.layers = _hidden_layers(backbone)
        for index, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(partial(_show, self.slot, index), with_kwargs=True)
        self.heads = nn.ModuleDict(dict(heads or {}))
        self.router = router
        self.eval()
        self.requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
    ) -> "TwinModel":
        """Load a twin.

        Args:
            folder: what `build` wrote.
            dtype: of weights and computation; None keeps the stored one. The router stays in float32.
            device: where to; None is the CPU.

        Raises:
            ArtifactError: if the folder is no twin of this version or a file has another size than its manifest says.
        """
        artifact = TwinArtifact.open(folder)
        backbone = load_backbone(artifact.path, dtype=dtype)
        heads = {name: load_head(*head) for name in artifact.expert_names if (head := artifact.head(name))}
        to = backbone.dtype
        exclusive = {name: artifact.exclusive(name) for name in artifact.expert_names}
        model = cls(
            backbone,
            {name: {key: part.to(to) for key, part in parts.items()} for name, parts in exclusive.items()},
            kinds=artifact.kinds,
            heads=heads,
            router=artifact.router(),
            tokenizer=load_tokenizer(artifact.path),
            max_length=artifact.manifest["recipe"]["max_length"],
        )
        model.heads.to(to)
        return model.to(device) if device is not None else model

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or convert; merged weights would be stale."""
        self.merged.clear()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.backbone.parameters()).device

    @torch.inference_mode()
    def forward(
        self, *, gate: Tensor | None = None, expert: str | Sequence[str] | None = None, **inputs: Any
    ) -> TwinOutput:
        """Answer a batch; every row is mixed by its own gate.

        Args:
            gate: (batch, expert), the caller's own; None asks the router, or takes `expert` alone where one is given.
            expert: whose head answers, one name or one a row; None takes the gate's largest.
            **inputs: what the backbone takes: input_ids (batch, seq), attention_mask, pixel_values, ...

        Returns:
            Logits, gate, experts, fall-back flags.

        Raises:
            GateError: if the gate has another shape, is not finite, or an expert's name is unknown.
        """
        rows, fallback = _rows(inputs), None
        if gate is not None:
            gate = self._checked(gate, rows)
            names = self._named(gate) if expert is None else self._names(expert, rows)
        elif expert is not None:
            names = self._names(expert, rows)
            gate = self.one_hot(names)
        else:
            if self._required_router().settings.one_pass and self.heads:
                routing, outputs = self._route_on_the_way(inputs)
                names = self._named(routing.router_logits)
                logits = self.answer(outputs, names, **inputs)
                return TwinOutput(
                    logits=logits,
                    gate=routing.gate,
                    expert=names,
                    fallback=routing.fallback,
                    last_hidden_state=outputs[0],
                )
            routing = self._routing(inputs)
            gate, fallback = routing.gate, routing.fallback
            names = self._named(routing.router_logits)
        if not self.heads:
            with self._gated(gate, tokens=_tokens(inputs)):
                outputs = self.backbone(**inputs)
            logits, hidden = outputs.get("logits"), outputs.get("last_hidden_state")
            return TwinOutput(logits=logits, gate=gate, expert=names, fallback=fallback, last_hidden_state=hidden)
        outputs = self.encode(gate, **inputs)
        logits = self.answer(outputs, names, **inputs)
        return TwinOutput(logits=logits, gate=gate, expert=names, fallback=fallback, last_hidden_state=outputs[0])

    def route(self, **inputs: Any) -> Tensor:
        """The gate only, (batch, expert): rows sum to 1, zeros for an input left to the shared expert."""
        return self.routing(**inputs).gate

    @torch.inference_mode()
    def routing(self, **inputs: Any) -> Routing:
        """Gate, scores of the experts and fall-back flags of every row."""
        return self._routing(inputs)

    @torch.inference_mode()
    def encode(self, gate: Tensor | None, **inputs: Any) -> ModelOutput:
        """The backbone's output under a gate (batch, expert), None for the shared expert alone."""
        with self._gated(gate, tokens=_tokens(inputs)):
            outputs: ModelOutput = self.backbone.base_model(**inputs, return_dict=True)
        return outputs

    @torch.inference_mode()
    def encode_as_routed(self, gate: Tensor, **inputs: Any) -> ModelOutput:
        """The backbone's output under gates of this twin's router; with `one_pass` only the layers above are gated."""
        if self.router is not None and self.router.settings.one_pass:
            return self._one_pass(inputs, lambda _: gate)
        return self.encode(gate, **inputs)

    @torch.inference_mode()
    def answer(self, outputs: ModelOutput, experts: Sequence[str], **inputs: Any) -> list[Tensor]:
        """The heads' logits of every row, given the backbone's output.

        Args:
            outputs: of `encode`.
            experts: (batch,) names: whose head answers which row.
            **inputs: what the backbone took; some heads look at input_ids.

        Returns:
            One (num_labels,) tensor a row.
        """
        logits: list[Tensor] = [torch.empty(0)] * len(experts)
        for name in sorted(set(experts)):
            rows = [row for row, expert in enumerate(experts) if expert == name]
            picked = _take(outputs, rows, len(experts))
            answered = _with_outputs(self.heads[name], picked)(**_take(inputs, rows, len(experts))).logits
            for row, value in zip(rows, answered, strict=True):
                logits[row] = value
        return logits

    @torch.inference_mode()
    def features(self, **inputs: Any) -> Tensor:
        """What the router sees: hidden states of the shared expert, averaged over real tokens (METHOD §4).

        Returns:
            (batch, feature), float32.

        Raises:
            GateError: if there is no router, or it looks at tokens only.
        """
        hidden = self._required_router().settings.hidden
        if hidden is None:
            raise GateError("this twin's router looks at tokens, not at features of the shared expert")
        return self.features_as(hidden, **inputs)

    @torch.inference_mode()
    def features_as(self, spec: str, **inputs: Any) -> Tensor:
        """Features by another specification than the router's, (batch, feature): `last`, `all`, `layer:K`, ..."""
        mask = inputs.get("attention_mask")
        if spec == "last":
            return _pool(self.encode(None, **inputs)[0], mask)
        chosen = _layers(spec, len(self.layers) + 1)
        if self.layers and max(chosen) < len(self.layers):
            probe = Probe(chosen, mask)
            with suppress(EnoughError), self.slot.use(None), self.slot.watch(probe):
                self.backbone.base_model(**inputs, return_dict=True)
            return probe.features()
        states = self.encode(None, **inputs, output_hidden_states=True)["hidden_states"]
        chosen = _layers(spec, len(states))
        beyond = [layer for layer in chosen if layer >= len(states)]
        if beyond:
            raise MismatchError(
                f"router.features: layer {beyond[0]} must be at most {len(states) - 1}, the model's last"
            )
        return torch.cat([_pool(states[layer], mask) for layer in chosen], dim=1)

    @torch.inference_mode()
    def generate(self, *, gate: Tensor | None = None, expert: str | Sequence[str] | None = None, **inputs: Any) -> Any:
        """Transformers' generate under gates fixed from the prompts (METHOD §5).

        Args:
            gate: (batch, expert); None asks the router, or takes `expert`.
            expert: one name, or one a row.
            **inputs: of transformers' generate: input_ids, attention_mask, max_new_tokens, num_beams, ...
        """
        rows = _rows(inputs)
        if gate is not None:
            gate = self._checked(gate, rows)
        elif expert is not None:
            gate = self.one_hot(self._names(expert, rows))
        else:
            gate = self.route(**_prompt(self.backbone, inputs))
        backbone: Any = self.backbone
        new = int(inputs.get("max_new_tokens") or backbone.generation_config.max_new_tokens or _NEW_TOKENS)
        with self._gated(gate, tokens=_tokens(inputs) + new * rows, calls=1 + new):
            return backbone.generate(**inputs)

    @torch.no_grad()
    def materialize(self, gate_row: Tensor) -> PreTrainedModel:
        """A plain transformers model for one gate, with the head of its largest weight.

        Args:
            gate_row: (expert,).

        Returns:
            A model of the expert's class (or the base's, where experts share the output), independent of this one.
        """
        gate = self._checked(gate_row[None], 1)[0]
        state = self.state_for(gate)
        if not self.heads:
            return _model_from(type(self.backbone), self.backbone.config, state)
        head: Any = self.heads[self.expert_names[int(gate.argmax())]]
        prefix = type(head).base_model_prefix
        body = {k.removeprefix(f"{prefix}."): v for k, v in state.items()}
        own = {k: v.detach().clone() for k, v in head.state_dict().items() if not k.startswith(f"{prefix}.")}
        names = head.meta_names
        return _model_from(
            type(head),
            head.config,
            {**own, **{f"{prefix}.{k}": v for k, v in body.items() if f"{prefix}.{k}" in names}},
        )

    @torch.no_grad()
    def state_for(self, gate: Tensor) -> dict[str, Tensor]:
        """All weights of the backbone for one gate (expert,), by the shared expert's names; copies."""
        stored: dict[str, Tensor] = {name: self.backbone.get_parameter(name) for name in self.parameter_names}
        stored |= {name: self.backbone.get_buffer(name) for name in self.buffer_names}
        state = {name: value.detach().clone() for name, value in stored.items()}
        for module, layer in self.gated.items():
            for leaf, value in layer.materialized(gate).items():
                state[f"{module}.{leaf}"] = value
        return state

    def one_hot(self, names: Sequence[str]) -> Tensor:
        """(batch, expert) gates of one expert a row."""
        columns = torch.tensor([self.expert_names.index(name) for name in names], device=self.device)
        return nn.functional.one_hot(columns, len(self.expert_names)).float()

    @contextmanager
    def _gated(self, gate: Tensor | None, *, tokens: int, calls: int = 1) -> Iterator[None]:
        """Run the backbone under a gate, for so many tokens in so many calls.

        The first time, find out which layers read one input.
        """
        context = None if gate is None else self._context(gate, tokens, calls)
        if context is not None and not self._watched:
            context.readers = []
        with self.slot.use(context):
            yield
        if context is not None and context.readers:
            join_readers(context.readers)
            self._watched = True

    def _context(self, gate: Tensor, tokens: int, calls: int) -> GateContext:
        path: Any = self.mode if self.mode in ("all", "gather") else None
        context = GateContext(gate, path=path, keep=calls > 1)
        if self.mode not in ("auto", "merge") or (self.mode == "auto" and len(context.gate) > 1):
            return context
        rows: dict[tuple[float, ...], list[int]] = {}
        for index, row in enumerate(context.gate.tolist()):
            rows.setdefault(tuple(row), []).append(index)
        if self.mode == "merge" or (self._watched and self.merged.pays(next(iter(rows)), tokens, calls)):
            context.merged = [(own, self.merged.weights(row, context.gate[own[0]])) for row, own in rows.items()]
        return context

    def _routing(self, inputs: Mapping[str, Any]) -> Routing:
        router = self._required_router()

        def features(rows: Tensor | None) -> Tensor:
            return self.features(**(inputs if rows is None else _take(inputs, rows.tolist(), _rows(inputs))))

        return self._without_small(router.decide(token_ids(inputs) if router.settings.tokens else None, features))

    def _without_small(self, routing: Routing) -> Routing:
        return replace(routing, gate=keep_large(routing.gate, self.drop_below))

    def _route_on_the_way(self, inputs: Mapping[str, Any]) -> tuple[Routing, ModelOutput]:
        """One pass: what lies below is computed once and serves both the router and the answer."""
        router = self._required_router()
        ids = token_ids(inputs) if router.settings.tokens else None
        routings: list[Routing] = []

        def gate_of(features: Tensor) -> Tensor:
            routings.append(self._without_small(router(features, ids)))
            return routings[0].gate

        outputs = self._one_pass(inputs, gate_of)
        return routings[0], outputs

    def _one_pass(self, inputs: Mapping[str, Any], gate_of: Callable[[Tensor], Tensor]) -> ModelOutput:
        """Shared weights up to the router's last feature layer, from there on under the gate that features give.

        Raises:
            MismatchError: if the router looks at the last layer, above which nothing is left to gate.
        """
        features = self._required_router().settings.hidden or "all"
        _check_one_pass(features, len(self.layers))
        chosen = _layers(features, len(self.layers) + 1)

        def gate_from_here(features: Tensor) -> None:
            self.slot.context = self._context(gate_of(features), _tokens(inputs), 1)

        with self.slot.use(None), self.slot.watch(Probe(chosen, inputs.get("attention_mask"), gate_from_here)):
            outputs: ModelOutput = self.backbone.base_model(**inputs, return_dict=True)
        return outputs

    def _required_router(self) -> Router:
        if self.router is None:
            raise GateError("this twin has no router; give a gate or an expert")
        return self.router

    def _named(self, scores: Tensor) -> list[str]:
        """The expert with the largest score of every row, (batch, expert)."""
        return [self.expert_names[index] for index in scores.argmax(dim=1).tolist()]

    def _names(self, expert: str | Sequence[str], rows: int) -> list[str]:
        names = [expert] * rows if isinstance(expert, str) else list(expert)
        unknown = [name for name in names if name not in self.expert_names]
        if unknown:
            raise GateError(f"unknown expert {unknown[0]!r}; this twin has {', '.join(self.expert_names)}")
        if len(names) != rows:
            raise GateError(f"there must be one expert or one a row, found {len(names)} for {rows} rows")
        return names

    def _checked(self, gate: Tensor, rows: int) -> Tensor:
        expected = (rows, len(self.expert_names))
        if tuple(gate.shape) != expected:
            raise GateError(f"gate must be (batch, expert) = {expected}, found {tuple(gate.shape)}")
        gate = gate.to(self.device, torch.float32 if not gate.is_floating_point() else gate.dtype)
        if not bool(gate.isfinite().all()):
            raise GateError("gate must be finite, found NaN or Inf")
        return gate


def _exchange_layers(
    backbone: PreTrainedModel, exclusive: Sequence[Mapping[str, Exclusive]], kinds: Mapping[str, Kind], slot: GateSlot
) -> dict[str, GatedLayer]:
    """Wrap every layer that has exclusive parts; layers tied to it get the same parts."""
    owners: dict[int, str] = {id(p): n for n, p in backbone.named_parameters()}
    modules: dict[str, dict[str, dict[int, Exclusive]]] = {}
    for module_name, module in backbone.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = owners[id(parameter)]
            by_expert = {i: parts[name] for i, parts in enumerate(exclusive) if name in parts}
            if by_expert:
                modules.setdefault(module_name, {})[leaf] = by_expert
    gated = {}
    for module_name, parts in modules.items():
        module = backbone.get_submodule(module_name)
        kind = layer_kind(module, "weight")
        if kind == "static":
            raise ArtifactError(
                f"{module_name} ({type(module).__name__}) cannot be gated; rebuild the twin with this version"
            )
        layer = LAYERS[kind](module, parts, len(exclusive), slot)
        parent, _, leaf = module_name.rpartition(".")
        setattr(backbone.get_submodule(parent), leaf, layer)
        gated[module_name] = layer
    return gated


def layer_kind(module: nn.Module, leaf: str) -> Kind:
    """What a gated layer does with a layer's parameter; `static` where no gated layer exists."""
    known = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.LayerNorm)
    if any(isinstance(module, cls) and type(module).forward is not cls.forward for cls in known):
        return "static"  # a subclass that computes something else
    if isinstance(module, nn.Linear):
        return "linear" if leaf == "weight" else "vector"
    if isinstance(module, Conv1D):
        return "conv1d" if leaf == "weight" else "vector"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode == "zeros" and module.padding != "same":
        if leaf != "weight":
            return "vector"
        return "conv" if module.groups == 1 else "grouped_conv"
    norm = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
    weight = getattr(module, "weight", None)
    return "vector" if norm and weight is not None and weight.ndim == 1 else "static"


def parameter_kinds(folder: Path) -> dict[str, Kind]:
    """What every tensor of a model folder is, from its class; no weight is read.

    Returns:
        Tensor name -> kind; buffers are `static`.

    Raises:
        MismatchError: if the folder's class is unknown to transformers.
    """
    model = _without_weights(folder)
    kinds: dict[str, Kind] = dict.fromkeys(model.state_dict(), "static")
    for module_name, module in model.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            kinds[f"{module_name}.{leaf}" if module_name else leaf] = layer_kind(module, leaf)
    return kinds


def by_class(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint under the names of its class's parameters; transformers renames some classes' on loading.

    What it splits or joins keeps the stored names. A folder of no known class is given as it is.
    """
    if not checkpoint.config:
        return checkpoint
    architectures = load_config(checkpoint.path).architectures or [""]
    if not hasattr(transformers, architectures[0]):
        return checkpoint
    model = _without_weights(checkpoint.path)
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    found = {name: rename_source_key(name, renamings, converters) for name in checkpoint.specs}
    return checkpoint.renamed({name: new for name, (new, converted) in found.items() if converted is None})


def require_shapes_of_class(checkpoint: Checkpoint) -> None:
    """Refuse a base that transformers would not load, such as an embedding with other rows than config.json says.

    Raises:
        MismatchError: naming the first tensor.
    """
    for name, tensor in _without_weights(checkpoint.path).state_dict().items():
        if name in checkpoint.specs and checkpoint.specs[name].shape != tensor.shape:
            raise MismatchError(
                f"base {checkpoint.path}: {name!r} has shape {list(checkpoint.specs[name].shape)}, by config.json it "
                f"must be {list(tensor.shape)}; one of them is wrong"
            )


def _without_weights(folder: Path) -> PreTrainedModel:
    """A folder's model on the meta device."""
    config = load_config(folder)
    with torch.device("meta"):
        return model_class(config, folder)(config)


def check_router(folder: Path, settings: RouterSettings) -> None:
    """Refuse features that a model cannot give, before anything is built; no weight is read.

    Args:
        folder: of the model.
        settings: the recipe's.

    Raises:
        MismatchError: if `one_pass` leaves no layer to gate, or the model has no single list of layers to watch.
    """
    if not settings.one_pass or settings.hidden is None:
        return
    _check_one_pass(settings.hidden, len(_hidden_layers(_without_weights(folder))))


def _check_one_pass(features: str, layers: int) -> None:
    """A router that looks at `features` must leave layers above it, of so many."""
    highest = max(_layers(features, layers + 1), default=layers)
    if highest >= layers:
        raise MismatchError(
            f"router.one_pass needs features of layers below the last, {layers}, found {features}"
            if layers
            else "router.one_pass needs a model whose hidden states pass through one list of layers"
        )


def load_config(folder: Path) -> PretrainedConfig:
    """A model folder's config.

    Raises:
        MismatchError: if there is none, or of a type unknown to transformers.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
        return config
    except (OSError, ValueError, KeyError) as error:
        raise MismatchError(f"{folder} must be a transformers model folder: {str(error).splitlines()[0]}") from error


def model_class(config: PretrainedConfig, where: Path | str) -> type[PreTrainedModel]:
    """The class that config.json names.

    Raises:
        MismatchError: if it names none, or one that transformers does not have.
    """
    names = config.architectures or []
    found = getattr(transformers, names[0], None) if names else None
    if found is None:
        raise MismatchError(
            f"{where}: config.json must name a transformers class in architectures, found {names or 'none'}"
        )
    loaded: type[PreTrainedModel] = found
    return loaded


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, None if it has none; one without a padding token pads with its end token."""
    if not (folder / "tokenizer_config.json").exists():
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_backbone(folder: Path, like: Path | None = None, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model folder's model in eval mode; every parameter must be found.

    Args:
        folder: with the weights.
        like: another folder whose class is used, such as the base's for an expert; None is the folder's own.
        dtype: of weights and computation; None keeps the stored one.
    """
    config = load_config(like or folder)
    cls: Any = model_class(config, like or folder)
    with quiet():
        model, info = cls.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ArtifactError(f"{folder} lacks {len(missing)} parameters of {cls.__name__}, first {missing[0]!r}")
    loaded: PreTrainedModel = model.eval()
    return loaded


@contextmanager
def quiet() -> Iterator[None]:
    """Load or save without transformers' own progress bars and notes; the user's settings return afterwards."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load_head(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """A whole model of the expert's class whose backbone holds no weights: only its head answers.

    Raises:
        MismatchError: if the tensors are not those of the class's head.
    """
    settings = AutoConfig.for_model(**config)
    cls = model_class(settings, "an expert")
    with torch.device("meta"):
        model: Any = cls(settings)
    prefix = cls.base_model_prefix
    names = set(model.state_dict())
    expected = {name for name in names if not name.startswith(f"{prefix}.")}
    if expected != set(tensors):
        odd = sorted(expected.symmetric_difference(tensors))
        raise MismatchError(
            f"the head of {cls.__name__} must hold {sorted(expected)}, found {sorted(tensors)} (differs in {odd[0]!r})"
        )
    setattr(model, prefix, nn.Identity())
    try:
        model.load_state_dict(dict(tensors), assign=True)
    except RuntimeError as error:
        raise MismatchError(
            f"the head of {cls.__name__} does not fit its config: {str(error).splitlines()[-1].strip()}"
        ) from error
    model.meta_names = names
    head: PreTrainedModel = model.eval()
    return head


class _Computed(nn.Module):
    """Stands where a head model expects its backbone, and hands over what the gated backbone has computed."""

    def __init__(self, outputs: ModelOutput) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *_: Any, **__: Any) -> ModelOutput:
        return self.outputs


def _with_outputs(head: Any, outputs: ModelOutput) -> nn.Module:
    """A shallow copy of a head model over computed outputs; the original is not touched: calls run side by side."""
    shallow = copy.copy(head)
    shallow._modules = {**head._modules, type(head).base_model_prefix: _Computed(outputs)}
    model: nn.Module = shallow
    return model


def _take(values: Any, rows: Sequence[int], batch: int) -> Any:
    """Rows of every tensor whose first axis is the batch; all of them are taken as they are."""
    if len(rows) == batch:
        return values
    picked = {k: v[list(rows)] if isinstance(v, Tensor) and len(v) == batch else v for k, v in values.items()}
    return type(values)(**picked) if isinstance(values, ModelOutput) else picked


def backbone_from(folder: Path, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model of a folder's class with other weights, by the folder's tensor names."""
    config = load_config(folder)
    return _model_from(model_class(config, folder), config, state)


def _model_from(cls: type[PreTrainedModel], config: PretrainedConfig, state: Mapping[str, Tensor]) -> PreTrainedModel:
    like = next(v for v in state.values() if v.is_floating_point())
    make: Any = cls._from_config  # what from_pretrained calls: buffers keep the dtype they need
    model = make(copy.deepcopy(config), dtype=like.dtype).to(like.device)
    missing, unexpected = model.load_state_dict(dict(state), strict=False, assign=True)
    model.tie_weights()
    tied = set(model.all_tied_weights_keys) if hasattr(model, "all_tied_weights_keys") else set()
    lost = [name for name in missing if name not in tied]
    odd = lost + [name for name in unexpected if state[name].is_floating_point()]  # integers are buffers of older files
    if odd:
        raise ArtifactError(f"{cls.__name__} does not take the twin's weights: {odd[0]!r}")
    built: PreTrainedModel = model.eval()
    return built


class EnoughError(Exception):
    """Ends a pass whose remaining layers nobody needs."""


class Probe:
    """Looks at hidden states as they pass, and pools those that the router wants."""

    def __init__(
        self, wanted: Sequence[int], mask: Tensor | None, done: Callable[[Tensor], None] | None = None
    ) -> None:
        """Wait for hidden states.

        Args:
            wanted: which; K is what enters layer K.
            mask: (batch, seq), 1 for real tokens.
            done: called with the features once the last one wanted was seen; None ends the pass there.
        """
        self.wanted = list(wanted)
        self.mask = mask
        self.done = done
        self.pooled: dict[int, Tensor] = {}

    def see(self, index: int, states: Tensor) -> None:
        """Hidden states on their way into a layer."""
        if index in self.wanted:
            self.pooled[index] = _pool(states, self.mask)
            if index == max(self.wanted):
                if self.done is None:
                    raise EnoughError
                self.done(self.features())

    def features(self) -> Tensor:
        """(batch, feature), as `wanted` orders them."""
        return torch.cat([self.pooled[index] for index in self.wanted], dim=1)


def _hidden_layers(backbone: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The layers that hidden states pass through one after the other; none where the model has no single such list."""
    count = getattr(backbone.config, "num_hidden_layers", None)
    lists = [m for m in backbone.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return tuple(lists[0]) if len(lists) == 1 else ()


def _show(slot: GateSlot, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Before a layer runs: what enters it is shown to the probe of the call under way."""
    if slot.probe is not None:
        slot.probe.see(index, args[0] if args else kwargs["hidden_states"])


def _layers(spec: str, count: int) -> list[int]:
    """Which of a model's hidden states a specification names; 0 is the embeddings."""
    if spec == "all":
        return list(range(count))
    if spec == "embeddings":
        return [0]
    return [int(part) for part in spec.partition(":")[2].strip("[]").split(",")]


def _pool(states: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real tokens of (batch, seq, hidden), the positions of (batch, hidden, h, w), in float32."""
    states = states.float()
    if states.ndim == 4:
        return states.flatten(2).mean(dim=2)
    if mask is None:
        return states.mean(dim=1)
    weights = mask.to(states).unsqueeze(-1)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)


def _prompt(backbone: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Of generate's inputs those of one forward pass; positions count from the first real token, as generate does."""
    prompt = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
    if "attention_mask" in prompt and "position_ids" in inspect.signature(backbone.base_model.forward).parameters:
        prompt["position_ids"] = (prompt["attention_mask"].long().cumsum(dim=1) - 1).clamp_min(0)
    return prompt


def _tokens(inputs: Mapping[str, Any]) -> int:
    """Of a batch of text; other inputs have as many as rows."""
    ids = inputs.get("input_ids")
    return ids.numel() if ids is not None else _rows(inputs)


def _rows(inputs: Mapping[str, Any]) -> int:
    for value in inputs.values():
        if isinstance(value, Tensor):
            return len(value)
    raise GateError("inputs must hold at least one tensor, (batch, ...)")
