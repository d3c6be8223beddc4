"""The twin as a torch module: a gated backbone, heads per expert, one router in front."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from twinmerge.errors import GateError
from twinmerge.hf.classes import backbone_name
from twinmerge.hf.example import example_inputs
from twinmerge.hf.features import EnoughError, Looked, Probe, hidden_layers, pooled, read, show
from twinmerge.hf.heads import (
    TwinOutput,
    answered,
    asked,
    called,
    encode,
    load_head,
    overlaid,
    rows_of,
    take,
    tokens_of,
    with_backbone,
)
from twinmerge.hf.images import load_processor, reads_images
from twinmerge.hf.loading import load_backbone, load_tokenizer, model_from
from twinmerge.hf.loss import before, loss_of, loss_of_texts, with_decoder_inputs
from twinmerge.hf.own import OWN, Own
from twinmerge.hf.surface import Surface
from twinmerge.hf.vocabulary import listen, own_state, vocabulary_tables, with_tokens
from twinmerge.hf.writing import Generation
from twinmerge.models.vocabulary import Vocabulary
from twinmerge.routing.router import Router, Routing
from twinmerge.routing.store import load_router
from twinmerge.runtime.gate import keep_large
from twinmerge.runtime.merged import MergeCache
from twinmerge.runtime.module import Mode, TwinModule
from twinmerge.runtime.precision import Running
from twinmerge.runtime.survey import Way
from twinmerge.tensors.parts import Part
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.twin.features import Layers

__all__ = ["Mode", "TwinModel"]


class TwinModel(Generation, Surface):
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
        exclusive: Mapping[str, Mapping[str, Part]],
        *,
        heads: Mapping[str, PreTrainedModel] | None = None,
        router: Router | None = None,
        tokenizer: Any = None,
        processor: Any = None,
        max_length: int | None = None,
        own: Mapping[str, Own] | None = None,
        drop_below: float = 0.02,
        merge_bytes: int = 2**30,
        fallback: Sequence[str] = (),
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """Gate a shared expert; `from_pretrained` is the usual way in.

        Args:
            backbone: the shared expert, taken over.
            exclusive: expert -> parameter name -> exclusive part; the order is the gate's.
            heads: expert -> a whole model of the expert's class without a backbone; none for a shared output.
            router: in front; without one every call needs a gate or an expert.
            tokenizer: of the shared expert.
            processor: of the images that it reads.
            max_length: tokens an input is cut at.
            own: expert -> what it has of its own beside weights.
            drop_below: gates of the router under this are dropped (`gate.keep_large` says what that can change); a
                caller's gates are used as they are.
            merge_bytes: what merged weights may take (`merged.MergeCache`).
            fallback: parameters that are left to the fall-back (`module.TwinModule`) whatever a dry run finds.
            vocabulary: what the rows of its tables are, where experts have tokens of their own.
        """
        super().__init__()
        self.drop_below = drop_below
        self.expert_names = tuple(exclusive)
        self.tokenizer = tokenizer
        self.processor = processor
        self.max_length = max_length
        self.own = dict(own or {})
        self.vocabulary = vocabulary
        self.tables = vocabulary_tables(backbone)
        self.twin = TwinModule(
            backbone,
            exclusive,
            example=partial(example_inputs, backbone),
            fallback=fallback,
            merge_bytes=merge_bytes,
        )
        self.layers = hidden_layers(backbone)
        for index, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(partial(show, self.twin.slot, index), with_kwargs=True)
        if vocabulary is not None:
            listen(backbone, vocabulary, self.expert_names, self.twin.slot)
        self.heads = nn.ModuleDict(dict(heads or {}))
        self.asking = next((name for name, head in self.heads.items() if head.asks), None)
        self.router = router
        self.eval()
        self.requires_grad_(False)
        output: Any = backbone.get_output_embeddings()  # type: ignore[no-untyped-call]
        if output is not None:
            output.requires_grad_(True)  # torch copies a whole matrix without, where it multiplies the last token alone

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
    ) -> "TwinModel":
        """Load a twin.

        Args:
            folder: what `build` wrote.
            dtype: of weights and computation; None is the stored one, or float32 where that is of 16 bits and the
                processor slow at them (`runtime.precision.Running`). The router stays in float32.
            device: where to; None is the CPU.

        Raises:
            ArtifactError: if the folder is no twin of this version or a file has another size than its manifest says.
        """
        artifact = TwinArtifact.open(folder).require_model()
        backbone = load_backbone(artifact.path, dtype=dtype or Running.of(artifact.dtype, device=device or "cpu").dtype)
        heads = {name: load_head(*head) for name in artifact.expert_names if (head := artifact.head(name))}
        to, path, vocabulary = backbone.dtype, artifact.path, artifact.manifest.vocabulary
        added = vocabulary.added if vocabulary else {}
        exclusive = {name: artifact.exclusive(name) for name in artifact.expert_names}
        model = cls(
            backbone,
            {name: {key: part.to(to) for key, part in parts.items()} for name, parts in exclusive.items()},
            heads=heads,
            router=load_router(artifact.path / "router") if artifact.manifest.recipe.router else None,
            tokenizer=load_tokenizer(artifact.path),
            processor=load_processor(artifact.path, backbone),
            max_length=artifact.manifest.recipe.max_length,
            fallback=artifact.manifest.fallback or (),
            vocabulary=vocabulary,
            own={name: Own.read(path / "experts" / name / OWN, path, name, added.get(name)) for name in exclusive},
        )
        model.heads.to(to)
        return model.to(device) if device is not None else model

    @property
    def backbone(self) -> Any:
        """The gated shared expert."""
        return self.twin.module

    @property
    def reads_images(self) -> bool:
        """Whether inputs are pictures, not texts."""
        return reads_images(self.backbone)

    @property
    def channels(self) -> int:
        """Of a picture: 3 for colour, 1 for grey."""
        return int(getattr(self.backbone.config, "num_channels", 3))

    @property
    def merged(self) -> MergeCache:
        """Merged weights of the gates used last."""
        return self.twin.merged

    def paths(self) -> dict[str, Way]:
        """How each parameter that an expert changed is served: `fast`, or by the fall-back, a pass a distinct gate."""
        return self.twin.paths()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or convert; the router moves along and stays in float32, which its gates need."""
        router, self.router = self.router, None

        def move(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.router = None if router is None else router._apply(move)  # type: ignore[no-untyped-call]
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.twin.module.parameters()).device

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        gate: Tensor | None = None,
        expert: str | Sequence[str] | None = None,
        mode: Mode = "auto",
        labels: Any = None,
        **inputs: Any,
    ) -> TwinOutput:
        """Answer a batch; every row is mixed by its own gate.

        Args:
            input_ids: (batch, seq), of texts.
            attention_mask: (batch, seq), 1 for real tokens.
            gate: (batch, expert), the caller's own; None asks the router, or takes `expert` alone where one is given.
            expert: whose head answers, one name or one a row; None takes the gate's largest.
            mode: how gated layers compute (`module.TwinModule.run`), the same result each way.
            labels: (batch, seq) ids of which a language model's loss is asked, -100 where none is; the router sees the
                tokens before the first of a row alone. With heads: one entry a row, as its head's class takes it.
            **inputs: what else the backbone takes: pixel_values, past_key_values, use_cache, ...

        Returns:
            Loss, logits, gate, experts, fall-back flags.

        Raises:
            GateError: if the gate has another shape, is not finite, or an expert's name is unknown.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs = {**{name: value for name, value in given.items() if value is not None}, **inputs}
        inputs = inputs if labels is None or self.heads else with_decoder_inputs(self.backbone, inputs, labels)
        call, routing = encode if self.heads else called, None
        if gate is None and expert is None and inputs.get("past_key_values") is not None:
            raise GateError("a call that goes on from past_key_values needs the gate of its prompts")
        if gate is None and expert is None and labels is not None and not self.heads:
            routing = self._routing(before(inputs, labels))
            gate, names = routing.gate, [self.expert_names[index] for index in routing.expert.tolist()]
            outputs = self.twin.run(call, gate, self.asked(inputs), tokens=tokens_of(inputs), mode=mode)
        elif gate is None and expert is None:
            routing, outputs = self._routed(call, inputs, mode)
            gate, names = routing.gate, [self.expert_names[index] for index in routing.expert.tolist()]
        else:
            gate, names = self._given(gate, expert, rows_of(inputs))
            outputs = self.twin.run(call, gate, self.asked(inputs), tokens=tokens_of(inputs), mode=mode)
        logits = self.answer(outputs, names, **inputs) if self.heads else outputs.get("logits")
        return TwinOutput(
            loss=None if labels is None else self._loss(logits, labels, names),
            logits=logits,
            gate=gate,
            expert=names,
            probability=None if routing is None else routing.probability,
            fallback=None if routing is None else routing.fallback,
            last_hidden_state=outputs.get("last_hidden_state"),
            pooler_output=outputs.get("pooler_output"),
            past_key_values=outputs.get("past_key_values"),
        )

    def _loss(self, logits: Any, labels: Any, names: Sequence[str]) -> Tensor:
        """The mean over rows of what each row's class takes as its loss; of a language model over tokens."""
        if not self.heads:
            return loss_of_texts(self.backbone, logits, labels)
        losses = [loss_of(self.heads[name], one, label) for one, label, name in zip(logits, labels, names, strict=True)]
        return torch.stack(losses).mean()

    def route(self, **inputs: Any) -> Tensor:
        """The gate only, (batch, expert): rows sum to 1, zeros for an input left to the shared expert."""
        return self.routing(**inputs).gate

    @torch.inference_mode()
    def routing(self, **inputs: Any) -> Routing:
        """Gate, scores of the experts and fall-back flags of every row."""
        return self._routing(inputs)

    @torch.inference_mode()
    def encode(self, gate: Tensor | None, *, mode: Mode = "auto", **inputs: Any) -> ModelOutput:
        """The backbone's output under a gate (batch, expert), None for the shared expert alone."""
        outputs: ModelOutput = self.twin.run(encode, gate, self.asked(inputs), tokens=tokens_of(inputs), mode=mode)
        return outputs

    def asked(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Inputs as the experts' class gives them to its backbone (`heads.asked`)."""
        return inputs if self.asking is None else asked(self.heads[self.asking], inputs)

    @torch.inference_mode()
    def answer(self, outputs: ModelOutput, experts: Sequence[str], **inputs: Any) -> list[Tensor]:
        """What the heads say of every row, given the backbone's output.

        Args:
            outputs: of `encode`.
            experts: (batch,) names: whose head answers which row.
            **inputs: what the backbone took; some heads look at input_ids.

        Returns:
            One tensor a row: (num_labels,), or what `heads.answered` gives for every token.
        """
        logits: list[Tensor] = [torch.empty(0)] * len(experts)
        for name in sorted(set(experts)):
            rows = [row for row, expert in enumerate(experts) if expert == name]
            picked = take(outputs, rows, len(experts))
            found = answered(self.heads[name], picked, take(inputs, rows, len(experts)))
            for row, value in zip(rows, found, strict=True):
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
        layers = self._required_router().settings.features.layers
        if layers is None:
            raise GateError("this twin's router looks at tokens, not at features of the shared expert")
        return self.features_as(layers, **inputs)

    @torch.inference_mode()
    def features_as(self, layers: Layers, gate: Tensor | None = None, **inputs: Any) -> Tensor:
        """Features of any hidden states, (batch, feature), under a gate (batch, expert); None is the shared expert."""
        if self.layers and layers.chosen != "last":
            chosen = layers.among(len(self.layers) + 1)
            if max(chosen) < len(self.layers):
                seen: Tensor = self.twin.run(partial(self._seen, chosen), gate, inputs, tokens=tokens_of(inputs))
                return seen
        more = {} if layers.chosen == "last" else {"output_hidden_states": True}
        outputs = self.twin.run(read, gate, {**inputs, **more}, tokens=tokens_of(inputs))
        return pooled(outputs, layers, inputs.get("attention_mask"))

    def _seen(self, layers: Sequence[int], module: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Features of layers below the last, above which nothing is computed."""
        probe = Probe(layers, inputs.get("attention_mask"))
        with suppress(EnoughError), self.twin.slot.watch(probe):
            read(module, inputs)
        return probe.features()

    def own_of(self, expert: str | None) -> Own:
        """What an expert has of its own beside weights."""
        return self.own.get(expert or "", Own())

    @torch.no_grad()
    def materialize(self, gate_row: Tensor) -> PreTrainedModel:
        """A plain transformers model for one gate, with the head of its largest weight.

        Args:
            gate_row: (expert,).

        Returns:
            A model of the expert's class (or the base's, where experts share the output), independent of this one. It
            knows tokens by the ids of its largest weight's own tokenizer.
        """
        gate = self.twin.checked(gate_row[None], 1)[0]
        chosen = self.expert_names[int(gate.argmax())]
        state = own_state(self.twin.state_for(gate), self.tables, self.vocabulary, chosen)
        if not self.heads:
            config: Any = self.backbone.config
            if self.vocabulary is not None:
                config = with_tokens(config, len(self.vocabulary.own_rows(chosen)))
            return model_from(type(self.backbone), config, state)
        root = backbone_name(self.backbone) + "."
        body = {name.removeprefix(root): value for name, value in state.items()}
        return with_backbone(self.heads[chosen], body)

    def own_logits(self, logits: Tensor, expert: str) -> Tensor:
        """Logits (..., token) by the ids of an expert's own tokenizer; as they are where none has its own tokens."""
        if self.vocabulary is None or self.heads or logits.shape[-1] != self.vocabulary.size:
            return logits
        return logits[..., self.vocabulary.own_rows(expert).to(logits.device)]

    def one_hot(self, names: Sequence[str]) -> Tensor:
        """(batch, expert) gates of one expert a row."""
        columns = torch.tensor([self.expert_names.index(name) for name in names], device=self.device)
        return nn.functional.one_hot(columns, len(self.expert_names)).float()

    def _routing(self, inputs: Mapping[str, Any]) -> Routing:
        return self._ask(Looked(self.features_as, inputs))

    def _ask(self, looked: Looked) -> Routing:
        """What the router says, less its small gates."""
        routing = self._required_router().route(looked)
        return replace(routing, gate=keep_large(routing.gate, self.drop_below))

    def _routed(self, call: Any, inputs: Mapping[str, Any], mode: Mode) -> tuple[Routing, ModelOutput]:
        """Route and answer; where the router looked at a pass under its own guess, only rows of wrong guesses run."""

        def run(gate: Tensor, own: Mapping[str, Any]) -> ModelOutput:
            outputs: ModelOutput = self.twin.run(call, gate, self.asked(own), tokens=tokens_of(own), mode=mode)
            return outputs

        looked = Looked(self.features_as, inputs, run if self.asking is None else None)
        routing = self._ask(looked)
        if looked.gate is None:
            return routing, run(routing.gate, inputs)
        wrong = (routing.gate != looked.gate).any(dim=1).nonzero()[:, 0]
        if not len(wrong):
            return routing, looked.outputs
        own = take(inputs, wrong.tolist(), len(routing.gate))
        return routing, overlaid(looked.outputs, wrong, run(routing.gate[wrong], own))

    def _given(self, gate: Tensor | None, expert: str | Sequence[str] | None, rows: int) -> tuple[Tensor, list[str]]:
        """The gate and the experts that a caller names, of which one follows from the other."""
        names = None if expert is None else self._names(expert, rows)
        if gate is None:
            return self.one_hot(names or []), names or []
        gate = self.twin.checked(gate, rows)
        return gate, names or self._named(gate)

    def __getstate__(self) -> dict[str, Any]:
        """All but transformers' hooks on hidden states, which no file holds and which come back when needed."""
        if not any(_local_hooks(module) for module in self.modules()):
            return self.__dict__
        state = copy.deepcopy(self.__dict__, {id(t): t for t in (*self.parameters(), *self.buffers())})
        for module in [m for child in state["_modules"].values() if child is not None for m in child.modules()]:
            for key in _local_hooks(module):
                del module._forward_hooks[key]
            vars(module).pop("_output_capturing_hooks_installed", None)
        return state

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


def _local_hooks(module: nn.Module) -> list[int]:
    """Hooks that are functions within functions."""
    return [key for key, hook in module._forward_hooks.items() if "<locals>" in getattr(hook, "__qualname__", "")]
