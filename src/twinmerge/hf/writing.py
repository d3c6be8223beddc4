"""Generation of a twin: gates fixed from the prompts, each row written under the settings of its expert."""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils.generic import ModelOutput

from twinmerge.hf.features import Looked, Run
from twinmerge.hf.generate import begun, goes_on, join, keeps_cache, prompt, said_otherwise, stops_of, writer
from twinmerge.hf.heads import called, rows_of, take, tokens_of
from twinmerge.hf.positions import reads_position_table
from twinmerge.routing.router import Routing
from twinmerge.runtime.module import Mode, TwinModule

_NEW_TOKENS = 20
"""What transformers' generate makes when nobody says how many."""
_OF_ONE_PASS = {"input_ids", "attention_mask", "max_new_tokens", "do_sample", "pad_token_id", "num_return_sequences"}
"""What may be asked of generate where the pass that routes is its first one."""


class Generation(nn.Module):
    """What `TwinModel` writes texts by."""

    backbone: Any
    expert_names: tuple[str, ...]
    router: Any
    tokenizer: Any
    twin: TwinModule
    own_of: Any
    features_as: Any
    _ask: Any
    _given: Any

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        gate: Tensor | None = None,
        expert: str | Sequence[str] | None = None,
        mode: Mode = "auto",
        generation_config: GenerationConfig | None = None,
        **asked: Any,
    ) -> Any:
        """Transformers' generate under gates fixed from the prompts (METHOD §5), each row by its expert's settings.

        Args:
            inputs: input_ids (batch, seq) of the prompts, as transformers' generate takes them.
            gate: (batch, expert); None asks the router, or takes `expert`.
            expert: whose generation config and end tokens hold, one name or one a row; None takes the gate's largest.
            mode: how gated layers compute (`module.TwinModule.run`), the same result each way.
            generation_config: what it says otherwise than the base's holds for every row; the rest, end tokens too, is
                each expert's own.
            **asked: of transformers' generate: input_ids, attention_mask, max_new_tokens, num_beams, streamer, ...
        """
        if inputs is not None:
            asked["input_ids"] = inputs
        if generation_config is not None:
            asked = {**said_otherwise(generation_config, self.backbone.generation_config), **asked}
        return self.generate_routed(gate=gate, expert=expert, mode=mode, **asked)[0]

    @torch.inference_mode()
    def generate_routed(
        self,
        *,
        gate: Tensor | None = None,
        expert: str | Sequence[str] | None = None,
        mode: Mode = "auto",
        **inputs: Any,
    ) -> tuple[Any, Routing | None]:
        """`generate`, and what the router said of the prompts; None where the caller gave gate or expert."""
        rows, looked, routing = rows_of(inputs), None, None
        if gate is None and expert is None:
            seen, run = prompt(self.backbone, inputs), self._prefill(inputs, mode)
            if run is not None:  # generate's own positions, which count padding: distances are the same
                seen.pop("position_ids", None)
            looked = Looked(self.features_as, seen, run)
            routing = self._ask(looked)
            gate, names = routing.gate, [self.expert_names[index] for index in routing.expert.tolist()]
        else:
            gate, names = self._given(gate, expert, rows)
        settings = [self.own_of(name).generation for name in names]
        ready = [False] * rows  # whether the pass that routed is the row's prefill
        if looked is not None and looked.gate is not None:
            same = (gate == looked.gate).all(dim=1).tolist()
            ready = [right and goes_on(self.backbone, own) for right, own in zip(same, settings, strict=True)]
        padding = inputs.get("pad_token_id") or self.backbone.generation_config.pad_token_id or 0
        parts = []
        for one in dict.fromkeys(zip(map(id, settings), ready, strict=True)):
            members = [row for row in range(rows) if (id(settings[row]), ready[row]) == one]
            asked, picked = settings[members[0]], take(inputs, members, rows)
            found = looked.outputs if looked is not None and ready[members[0]] else None
            config = writer(self.backbone, asked, inputs).generation_config
            stops = (*stops_of(config), *_texts(inputs.get("stop_strings")))
            if stops:
                tokenizer = self.own_of(names[members[0]]).tokenizer or self.tokenizer
                picked = {"tokenizer": tokenizer, **picked, "stop_strings": list(stops)}
            new = int(inputs.get("max_new_tokens") or config.max_new_tokens or _NEW_TOKENS)

            write = partial(_write, asked, found, members)
            calls = new if found is None else new - 1  # the pass over the prompts gives the first token
            tokens = (tokens_of(picked) if found is None else 0) + calls * len(members)
            written = self.twin.run(write, gate[members], picked, tokens=tokens, calls=calls, mode=mode, pad=padding)
            parts.append((members, written))
        return join(parts, padding), routing

    def _prefill(self, inputs: Mapping[str, Any], mode: Mode) -> Run | None:
        """A pass over prompts that keeps a cache to write on from; None where that is another pass than generate's."""
        plain = inputs.keys() <= _OF_ONE_PASS and inputs.get("num_return_sequences", 1) == 1
        if not plain or self.twin.fallback.names or not keeps_cache(self.backbone):
            return None
        mask = inputs.get("attention_mask")
        if mask is not None and not mask.all() and reads_position_table(self.backbone):
            return None
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.backbone.forward).parameters else {}

        def run(gate: Tensor, own: Mapping[str, Any]) -> ModelOutput:
            kept = {**own, "use_cache": True, **last}
            outputs: ModelOutput = self.twin.run(called, gate, kept, tokens=tokens_of(own), mode=mode)
            return outputs

        return run

    @property
    def routes_as_it_writes(self) -> bool:
        """Whether `generate` goes on from the pass that routes, so that routing before it would cost a pass more."""
        looked = self.router is not None and self.router.settings.features.form == "speculative"
        return looked and not self.twin.fallback.names and keeps_cache(self.backbone)


def _texts(given: str | Sequence[str] | None) -> Sequence[str]:
    return (given,) if isinstance(given, str) else given or ()


def _write(
    asked: GenerationConfig | None, found: Any, members: Sequence[int], module: Any, inputs: Mapping[str, Any]
) -> Any:
    """Generate under an expert's settings, from what a pass over the prompts found, if there was one."""
    model = writer(module, asked, inputs)
    begin = {} if found is None else {"past_key_values": begun(model, found, members)}
    return model.generate(**inputs, **begin)
