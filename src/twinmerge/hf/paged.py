"""Writes many texts at once, each under a gate of its own, on transformers' continuous batching.

Texts join and leave a batch step by step; one pass holds the tokens of all of them end to end, and the gate has a row a
token. Blocks of the cache are never shared between texts: keys and values depend on the gate.
"""

import asyncio
import copy
import itertools
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.logits_process import LogitsProcessorList

from twinmerge.errors import GateError, MismatchError, TwinMergeError
from twinmerge.hf.generate import SAMPLING, end_ids, keeps_cache, writer
from twinmerge.hf.model import TwinModel
from twinmerge.runtime.gate import GateContext
from twinmerge.runtime.layers import GatedLayer

KNOWN = ("5.23.",)
"""Versions of transformers whose manager looks inside as this file takes for granted."""
PAGE = 32
"""Tokens of a block of the cache."""


@dataclass(frozen=True)
class Wish:
    """How one text is to be written.

    Attributes:
        max_new_tokens: at most.
        temperature: 0 takes the likeliest token.
        top_p: of sampling, the share of the likeliest tokens.
        seed: makes sampling repeatable, whatever shares the batch; None takes another every time.
        top: how many of the likeliest tokens are told beside each; None tells no probability at all.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top: int | None = None


@dataclass(frozen=True)
class Token:
    """What was written in one step.

    Attributes:
        id: of the token.
        logprob: natural logarithm of the model's probability for it; None where nobody asked.
        top: the likeliest tokens and theirs.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class _Text:
    """A text under way."""

    gate: Tensor
    wish: Wish
    ids: list[int]
    """The prompt, and what was written."""
    processors: LogitsProcessorList
    generator: torch.Generator
    tokens: list[Token] = field(default_factory=list)
    broken: bool = False
    """Whether the model gave no numbers, as under an absurd gate."""


def require_paged(model: TwinModel) -> None:
    """Refuse a twin whose texts cannot share a batch token by token.

    Raises:
        MismatchError: saying why.
    """
    if not transformers.__version__.startswith(KNOWN):
        raise MismatchError(
            f"texts are served with transformers {' or '.join(f'{known}x' for known in KNOWN)}, whose continuous "
            f"batching is known here; found {transformers.__version__}"
        )
    backbone = model.backbone
    if not backbone.can_generate() or not keeps_cache(backbone):
        raise MismatchError(
            f"a {type(backbone).__name__} does not keep keys and values of every token in every layer; texts of such "
            "models are written by twinmerge predict"
        )
    if names := model.twin.fallback.names:
        raise MismatchError(
            f"{len(names)} parameters, first {names[0]!r}, need a pass for every different gate, so texts cannot share "
            "a batch; use twinmerge predict"
        )
    if backbone.config._attn_implementation != "sdpa":
        raise MismatchError(f"texts are served with sdpa attention, found {backbone.config._attn_implementation}")


class PagedWriter:
    """A thread that writes texts, and how they reach it from an event loop."""

    def __init__(self, model: TwinModel, *, batch_tokens: int, cache_tokens: int, texts: int) -> None:
        """Prepare; `start` starts.

        Args:
            model: a causal language model; it is not changed.
            batch_tokens: of one pass; a longer prompt takes several.
            cache_tokens: prompts and continuations under way, together; what does not fit waits.
            texts: in one pass, at most.

        Raises:
            MismatchError: if its texts cannot share a batch.
        """
        require_paged(model)
        self.model = model
        self._texts: dict[str, _Text] = {}
        self._numbers = itertools.count()
        self._last: tuple[tuple[str, ...], GateContext | None] = ((), None)
        self._gone = _Text(
            model.one_hot([model.expert_names[0]])[0] * 0, Wish(1), [], LogitsProcessorList(), _random(0)
        )
        paged = copy.copy(model.backbone)
        output: Any = model.backbone.get_output_embeddings()
        asks_gate = isinstance(output, GatedLayer) or model.vocabulary is not None  # of every token's text
        self._keeps = not asks_gate and paged._supports_logits_to_keep()

        @wraps(model.backbone.forward)
        def keeping(**batch: Any) -> Any:  # its signature says that it takes logits_to_keep
            return self._passed(**batch)

        paged.forward = keeping if self._keeps else self._passed
        greedy: Any = GenerationConfig
        self._manager = paged.init_continuous_batching(
            generation_config=greedy(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=math.ceil(cache_tokens / PAGE) + 1,
                max_batch_tokens=batch_tokens,
                max_requests_per_batch=texts,
                max_blocks_per_request=0,
                allow_block_sharing=False,
                use_async_batching=False,
                use_cuda_graph=False,
                auto_switch_to_flash=False,
            ),
        )

    def start(self) -> None:
        """Start the thread."""
        self._manager.start()

    def stop(self) -> None:
        """End the thread after its next pass; texts under way fail."""
        if self._manager.is_running():
            self._manager.stop(block=True, hard_stop=True)

    @property
    def running(self) -> bool:
        """Whether texts are being written."""
        return bool(self._manager.is_running())

    async def write(self, prompt: Sequence[int], gate: Tensor, expert: str | None, wish: Wish) -> AsyncGenerator[Token]:
        """Write a text, token by token; leaving the loop ends the work on it.

        Args:
            prompt: ids, at least one.
            gate: (expert,), fixed for the whole text.
            expert: whose end tokens and rules of writing hold; None are the base's.
            wish: how to write.

        Yields:
            What was written, an end token too.

        Raises:
            GateError: if the model gives no numbers under the gate, or under that of a text in the same pass: a weight
                of 0 in attention times no number is none either.
            TwinMergeError: if the writing failed.
        """
        name, updates = f"text-{next(self._numbers)}", asyncio.Queue[Any]()
        text = _Text(gate, wish, list(prompt), self._rules(len(prompt), expert, wish), _random(wish.seed))
        own = self.model.own_of(expert).generation or self.model.backbone.generation_config
        ends = list(end_ids(own)) or [-1]
        self._texts[name] = text
        self._manager.register_result_handler(name, updates.put_nowait)
        told, over = 0, False
        try:
            new = {"max_new_tokens": wish.max_new_tokens, "eos_token_id": ends, "streaming": True}
            over = self._manager.add_request(list(prompt), request_id=name, **new) is None
            if over:
                raise TwinMergeError("texts are no longer written; the server stops")
            while not over:
                found = await updates.get()
                over = found.is_finished()
                if found.error is not None:
                    raise TwinMergeError(f"the text was not written to its end: {found.error}")
                if text.broken:
                    raise GateError("under this gate the model gives no numbers; give smaller weights")
                for token in text.tokens[told : len(found.generated_tokens)]:
                    yield token
                told = len(found.generated_tokens)
        finally:
            del self._texts[name]
            if not over:
                self._manager.cancel_request(name)
            router = self._manager.output_router
            with router._lock:
                router.result_handlers.pop(name, None)

    def _rules(self, prompt: int, expert: str | None, wish: Wish) -> LogitsProcessorList:
        """What transformers' generate does to logits: an expert's own rules, and the sampling that was asked for."""
        asked = {"do_sample": wish.temperature > 0, "max_new_tokens": wish.max_new_tokens}
        model = writer(self.model.backbone, self.model.own_of(expert).generation, asked)
        settings = model.generation_config
        settings.do_sample = asked["do_sample"]
        for name in SAMPLING:
            setattr(settings, name, None)
        if settings.do_sample:
            settings.temperature, settings.top_p = wish.temperature, wish.top_p
        device = self.model.device
        model._prepare_special_tokens(settings, kwargs_has_attention_mask=True, device=device)
        found: LogitsProcessorList = model._get_logits_processor(settings, input_ids_seq_length=prompt, device=device)
        return found

    def _passed(self, **batch: Any) -> Any:
        """A pass over the tokens of all texts; says of each that has a next token which one it is."""
        futures = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        names = tuple(future.state.request_id for future in futures)
        texts = [self._texts.get(name, self._gone) for name in names]
        lengths = [future.query_length for future in futures]
        with self.model.twin.slot.use(self._context(names, texts, lengths)):
            outputs = self.model.backbone.forward(**batch)
        writing = [text for text, future in zip(texts, futures, strict=True) if future.has_new_token]
        places = list(range(len(writing))) if self._keeps else batch["logits_indices"][: len(writing)].tolist()
        self._choose(writing, outputs.logits[0], places)
        return outputs

    def _context(self, names: tuple[str, ...], texts: Sequence[_Text], lengths: Sequence[int]) -> GateContext | None:
        """The gate of a pass; texts that go on by one token each keep what their gates needed before."""
        steps = all(length == 1 for length in lengths)
        if steps and self._last[0] == names:
            return self._last[1]
        gate = torch.stack([text.gate for text in texts])
        gate = gate.repeat_interleave(torch.tensor(lengths, device=gate.device), dim=0)
        context = GateContext(gate, keep=steps, packed=True) if bool(gate.any()) else None
        self._last = (names, context) if steps else ((), None)
        return context

    def _choose(self, texts: Sequence[_Text], logits: Tensor, places: Sequence[int]) -> None:
        """Choose each text's next token, and leave logits (place, token) of which it is the largest."""
        if not texts:
            return
        likeliest, broken = logits[places].argmax(dim=-1).tolist(), logits[places].isnan().any(dim=-1).tolist()
        for text, place, token, no_numbers in zip(texts, places, likeliest, broken, strict=True):
            text.broken |= no_numbers
            if text.broken:
                logits[place] = 0.0
                continue
            if text.processors or text.wish.temperature > 0:
                token = _chosen(text, logits[place])
            told = _told(logits[place], token, text.wish.top)
            logits[place] = -torch.inf
            logits[place, token] = 0.0
            text.ids.append(token)
            text.tokens.append(told)


def _chosen(text: _Text, logits: Tensor) -> int:
    """The next token by a text's rules."""
    ids = torch.tensor([text.ids], device=logits.device)
    process: Any = text.processors
    scores = process(ids, logits[None].float().clone())
    if text.wish.temperature == 0:
        return int(scores[0].argmax())
    return int(torch.multinomial(scores[0].softmax(dim=-1).cpu(), 1, generator=text.generator))


def _told(logits: Tensor, token: int, top: int | None) -> Token:
    """A token with the model's own probabilities, before any rule."""
    if top is None:
        return Token(token)
    logprobs = logits.float().log_softmax(dim=-1)
    values, ids = logprobs.topk(top) if top else (logprobs[:0], logprobs[:0])
    return Token(token, float(logprobs[token]), tuple(zip(map(int, ids.tolist()), values.tolist(), strict=True)))


def _random(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
