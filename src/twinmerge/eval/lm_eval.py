"""Lets lm-evaluation-harness ask a twin: `python -m twinmerge.eval.lm_eval run --model twinmerge ...`.

The gate of a question comes from its context alone, never from the continuation that is scored: that holds the answer.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import GateError, InputError, MissingExtraError, TwinMergeError
from twinmerge.hf.generate import join
from twinmerge.hf.model import TwinModel

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils_hf import get_dtype, stop_sequences_criteria
except ImportError as error:
    raise MissingExtraError(
        "lm-evaluation-harness is not installed; install it with: pip install 'twinmerge[lm-eval]'"
    ) from error

SHARED = "shared"
"""Names the shared expert alone."""
_TAKEN = (
    *("batch_size", "max_batch_size", "max_length", "truncation", "softmax_dtype", "add_bos_token", "prefix_token_id"),
    *("think_end_token", "enable_thinking", "chat_template_args"),
)
"""Of HFLM's arguments what means the same for a twin."""
_Request = tuple[Any, list[int], list[int]]
"""The texts, the context's tokens, the continuation's; no texts for a window of a text that is scored whole."""


@register_model("twinmerge")
class TwinLM(HFLM):  # type: ignore[misc]  # published without types
    """A twin, one of its experts or its shared expert, as lm-evaluation-harness asks a model.

    Example:
        >>> TwinLM(pretrained="twin", expert="maths", batch_size=8)   # doctest: +SKIP
    """

    def __init__(
        self, pretrained: str, expert: str | None = None, dtype: str = "auto", device: str | None = None, **asked: Any
    ) -> None:
        """Load a twin.

        Args:
            pretrained: folder of the twin.
            expert: whose gate every question gets, `shared` for the shared expert alone; None asks the router.
            dtype: of weights and computation; `auto` is what `TwinModel.from_pretrained` takes.
            device: where to; None is the first GPU, or the CPU where there is none.
            **asked: HFLM's arguments, of which those of `_TAKEN` are known.

        Raises:
            InputError: if an argument has no meaning for a twin, or the twin writes no texts.
            GateError: if the expert is unknown, or there is neither router nor expert.
        """
        if unknown := sorted(asked.keys() - {*_TAKEN}):
            known = ("pretrained", "expert", "dtype", "device", *_TAKEN)
            raise InputError(
                f"model_args: {unknown[0]}={asked[unknown[0]]} means nothing for a twin; known are {', '.join(known)}"
            )
        chosen = None if dtype == "auto" else get_dtype(dtype)
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = TwinModel.from_pretrained(pretrained, dtype=chosen, device=where)
        if not model.can_generate():
            raise InputError(f"{pretrained} writes no texts; lm-evaluation-harness asks language models alone")
        if model.config.is_encoder_decoder:
            raise InputError(f"{pretrained} is an encoder-decoder; of twins, only decoders are evaluated so")
        self._gate = _fixed(model, expert)
        if expert == SHARED:
            model.own = {}  # no expert's end tokens either
        super().__init__(pretrained=model, tokenizer=_tokenizer(model, expert), **asked)
        self.folder = Path(pretrained)

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model; HFLM would ask the hub."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return {"model_num_parameters": count, "model_dtype": self.model.dtype, "twin": str(self.folder)}

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether it is what greedy writing would give.

        Args:
            requests: each is cut at the model's length, from the left.
            disable_tqdm: of HFLM; there is no bar here.
            override_bs: rows a batch; None is `batch_size`.
        """
        order = sorted(range(len(requests)), key=lambda row: -len(requests[row][1] + requests[row][2]))
        size = override_bs or self.batch_size
        if size == "auto":
            size = self._detect_batch_size([requests[row] for row in order]) if order else 1
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            scored = self._scored([requests[row] for row in rows])
            for row, score in zip(rows, scored, strict=True):
                found[row] = score
                if requests[row][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[row][0], score)
        return [found[row] for row in range(len(requests))]

    def _scored(self, batch: Sequence[_Request]) -> list[tuple[float, bool]]:
        contexts, texts = [], []
        for _, context, continuation in batch:
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation of {len(continuation)} tokens must fit the model's {self.max_length}; "
                    "shorten it, or give max_length"
                )
            kept = context[-(self.max_length + 1 - len(continuation)) :]
            contexts.append(kept)
            texts.append((kept + continuation)[:-1])
        gate = self._gates(batch, contexts)
        logits = self.model(**self._padded(texts), gate=gate).logits
        scores = []
        for row, text, (*_, continuation) in zip(logits, texts, batch, strict=True):
            said = row[len(text) - len(continuation) : len(text)].log_softmax(dim=-1, dtype=self.softmax_dtype)
            wanted = torch.tensor(continuation, device=said.device)
            likely = said.gather(1, wanted[:, None]).sum()
            scores.append((float(likely), bool((said.argmax(dim=-1) == wanted).all())))
        return scores

    def _gates(self, batch: Sequence[_Request], contexts: Sequence[list[int]]) -> Tensor:
        """(batch, expert) gates from contexts alone; where nothing was said before, the shared expert answers."""
        if self._gate is not None:
            return self._gate.expand(len(batch), -1)
        said = [texts is not None and context != [self.prefix_token_id] for texts, context, _ in batch]
        gate = torch.zeros(len(batch), len(self.model.expert_names), device=self.device)
        rows = [row for row, something in enumerate(said) if something]
        if rows:
            gate[rows] = self.model.route(**self._padded([contexts[row] for row in rows])).to(gate)
        return gate

    def _padded(self, texts: Sequence[list[int]]) -> dict[str, Tensor]:
        """Tokens padded on the right, and the mask of real ones, (batch, seq)."""
        fill, width = self.tokenizer.pad_token_id, max(map(len, texts))
        ids = torch.tensor([[*text, *[fill] * (width - len(text))] for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], *, attention_mask: Tensor, **asked: Any
    ) -> Tensor:
        """Texts written after prompts (batch, seq), an expert's at a time: stop sequences are watched row by row."""
        if asked.get("temperature", 0.0) == 0.0 and not asked.get("do_sample"):
            asked = {**asked, "do_sample": False}
            asked.pop("temperature", None)
        gate, experts = self._gate, [0] * len(context)
        if gate is None:
            routing = self.model.routing(input_ids=context, attention_mask=attention_mask)
            gate, experts = routing.gate, routing.expert.tolist()
        gate = gate.expand(len(context), -1)
        parts = []
        for expert in sorted({*experts}):
            rows = [row for row, one in enumerate(experts) if one == expert]
            name = {} if self._gate is not None else {"expert": self.model.expert_names[expert]}
            written = self.model.generate(
                input_ids=context[rows],
                attention_mask=attention_mask[rows],
                gate=gate[rows],
                max_new_tokens=max_length - context.shape[1],
                stopping_criteria=stop_sequences_criteria(self.tokenizer, stop, context.shape[1], len(rows)),
                pad_token_id=self.tokenizer.pad_token_id,
                **{"use_cache": True, **name, **asked},
            )
            parts.append((rows, written))
        joined: Tensor = join(parts, self.tokenizer.pad_token_id)
        return joined


def _fixed(model: TwinModel, expert: str | None) -> Tensor | None:
    """(1, expert), the gate of every question; None if the router is asked."""
    if expert == SHARED:
        return torch.zeros(1, len(model.expert_names), device=model.device)
    if expert is not None and expert not in model.expert_names:
        raise GateError(f"unknown expert {expert!r}; this twin has {', '.join(model.expert_names)}, and {SHARED!r}")
    if expert is None and model.router is None:
        raise GateError(f"this twin has no router; give expert=NAME or expert={SHARED}")
    return None if expert is None else model.one_hot([expert])


def _tokenizer(model: TwinModel, expert: str | None) -> Any:
    """That of the expert, if it is one; else the base's, which all experts' ids must be of."""
    if expert is not None:
        return model.own_of(expert).tokenizer or model.tokenizer
    for name in model.expert_names:
        own = model.own_of(name).tokenizer
        if own is not None and own.get_vocab() != model.tokenizer.get_vocab():
            raise InputError(f"expert {name!r} has a vocabulary of its own; evaluate it alone, with expert={name}")
    return model.tokenizer


def main() -> None:
    """`lm_eval`'s own command line, which then knows `--model twinmerge`."""
    try:
        cli_evaluate()
    except TwinMergeError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
