"""Puts what an engine says into the forms that OpenAI's and vLLM's clients read."""

import asyncio
import base64
import contextlib
import json
import struct
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from twinmerge.hf.paged import Token, Wish
from twinmerge.serve.bodies import Chat, Completion, Embedding, Inputs
from twinmerge.serve.engine import Engine, Text
from twinmerge.serve.faults import Fault
from twinmerge.serve.texts import Piece

_COMPLETION_TOKENS = 16
"""What /v1/completions writes if nobody says how much, as OpenAI's does."""


@dataclass
class _Choice:
    """One text of an answer, as far as it is written."""

    index: int
    text: Text
    said: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None

    def take(self, piece: Piece) -> None:
        """Add a piece."""
        self.said += piece.text
        self.tokens += piece.tokens
        self.finish = piece.finish


class Draft:
    """A request for texts on its way: begun, then answered whole or as a stream."""

    def __init__(self, body: Chat | Completion, choices: Sequence[_Choice]) -> None:
        """Take what was begun by `begin`."""
        self.body, self.choices = body, choices
        self.chat = isinstance(body, Chat)
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
        }
        self.told = body.logprobs if self.chat else body.logprobs is not None
        """Whether probabilities are told."""

    @classmethod
    async def begin(cls, engine: Engine, body: Chat | Completion) -> "Draft":
        """Route prompts and check them; nothing is written yet.

        Raises:
            Fault: if something cannot be honoured.
        """
        target = engine.target(body.model, body.twin.gate, body.twin.expert)
        if body.stream_options is not None and not body.stream:
            raise Fault(400, "stream_options are of streams; set stream, or leave them out", param="stream_options")
        if isinstance(body, Chat):
            asked, default = body.max_completion_tokens or body.max_tokens, engine.settings.max_new_tokens
            if body.top_logprobs is not None and not body.logprobs:
                raise Fault(400, "top_logprobs needs logprobs: true", param="top_logprobs")
            if body.messages[-1].role == "assistant":
                raise Fault(
                    400, "the last message must not be the assistant's: it is what is asked for", param="messages"
                )
            said = [{"role": one.role, "content": _content(one.content)} for one in body.messages]
            rows: list[dict[str, Any]] = [{"messages": said}]
            top = (body.top_logprobs or 0) if body.logprobs else None
        else:
            asked, default = body.max_tokens, min(_COMPLETION_TOKENS, engine.settings.max_new_tokens)
            rows, top = [{"text": prompt} for prompt in body.prompts], body.logprobs
        if asked is not None and asked > engine.settings.max_new_tokens:
            most = engine.settings.max_new_tokens
            raise Fault(400, f"max_tokens must be {most} at most on this server, found {asked}", param="max_tokens")
        wish = Wish(asked or default, body.temperature, body.top_p, body.seed, top)

        async def text(row: dict[str, Any], place: int) -> Text:
            seeded = wish if wish.seed is None else replace(wish, seed=wish.seed + place)
            return await engine.text(row, target, seeded, body.stops, asked=asked is not None)

        texts = await asyncio.gather(*(text(row, place) for row in rows for place in range(body.n)))
        return cls(body, [_Choice(index, one) for index, one in enumerate(texts)])

    async def whole(self) -> dict[str, Any]:
        """The answer, once everything is written."""
        async with contextlib.aclosing(self._steps()) as steps:
            async for choice, piece in steps:
                choice.take(piece)
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self._choice(choice, choice.said, choice.tokens, whole=True) for choice in self.choices]
        return {**self.head, "object": kind, "choices": choices, "usage": self._usage(), "twin": self._twin()}

    async def stream(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events, a piece at a time."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        head = {**self.head, "object": kind}
        usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        rest = {"usage": None} if usage else {}
        if self.chat:
            for choice in self.choices:
                delta = {"role": "assistant", "content": ""}
                first = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
                yield _event({**head, "choices": [first], "twin": choice.text.said, **rest})
        try:
            async with contextlib.aclosing(self._steps()) as steps:
                async for choice, piece in steps:
                    choice.take(piece)
                    if piece.text or piece.finish or self.told:
                        said = self._choice(choice, piece.text, piece.tokens, whole=False)
                        yield _event({**head, "choices": [said], "twin": choice.text.said, **rest})
        except Exception as error:  # noqa: BLE001 - the answer has begun, its status is sent: the stream says it
            yield _event(Fault(500, str(error) or type(error).__name__).body)
            return
        if usage:
            yield _event({**head, "choices": [], "usage": self._usage(), "twin": self._twin()})
        yield b"data: [DONE]\n\n"

    async def _steps(self) -> AsyncGenerator[tuple[_Choice, Piece]]:
        """Pieces of all texts as they come."""
        queue: asyncio.Queue[tuple[_Choice, Piece | BaseException]] = asyncio.Queue()

        async def pull(choice: _Choice) -> None:
            try:
                async with contextlib.aclosing(choice.text.pieces) as pieces:
                    async for piece in pieces:
                        queue.put_nowait((choice, piece))
            except Exception as error:  # noqa: BLE001 - raised again where the pieces are taken
                queue.put_nowait((choice, error))

        tasks = [asyncio.create_task(pull(choice)) for choice in self.choices]
        try:
            left = len(tasks)
            while left:
                choice, piece = await queue.get()
                if isinstance(piece, BaseException):
                    raise piece
                left -= piece.finish is not None
                yield choice, piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _choice(self, choice: _Choice, said: str, tokens: Sequence[Token], *, whole: bool) -> dict[str, Any]:
        logprobs = self._logprobs(choice, tokens) if self.told else None
        rest = {"logprobs": logprobs, "finish_reason": choice.finish}
        if not self.chat:
            return {"index": choice.index, "text": said, **rest}
        content = {"role": "assistant", "content": said} if whole else {"content": said}
        return {"index": choice.index, "message" if whole else "delta": content, **rest}

    def _logprobs(self, choice: _Choice, tokens: Sequence[Token]) -> dict[str, Any]:
        spell = choice.text.spell

        def one(token: int, logprob: float | None) -> dict[str, Any]:
            text = spell(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        if self.chat:
            content = [
                {**one(token.id, token.logprob), "top_logprobs": [one(*other) for other in token.top]}
                for token in tokens
            ]
            return {"content": content, "refusal": None}
        before = choice.tokens[: len(choice.tokens) - len(tokens)]
        offsets, place = [], sum(len(spell(token.id)) for token in before)
        for token in tokens:
            offsets.append(place)
            place += len(spell(token.id))
        return {
            "tokens": [spell(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{spell(other): logprob for other, logprob in token.top} for token in tokens],
            "text_offset": offsets,
        }

    def _usage(self) -> dict[str, int]:
        prompts = sum(choice.text.prompt_tokens for choice in self.choices[:: self.body.n])
        written = sum(len(choice.tokens) for choice in self.choices)
        return {"prompt_tokens": prompts, "completion_tokens": written, "total_tokens": prompts + written}

    def _twin(self) -> dict[str, Any] | list[dict[str, Any]]:
        """Who wrote: of each prompt, where there are several."""
        said = [choice.text.said for choice in self.choices[:: self.body.n]]
        return said[0] if len(said) == 1 else said


async def classify(engine: Engine, body: Inputs) -> dict[str, Any]:
    """What heads say, in the form of vLLM's /classify."""
    answers = await _answers(engine, body)
    if "embedding" in answers[0]:
        raise Fault(400, f"{engine.name} embeds; ask /v1/embeddings")
    data = [{"index": index, **answer} for index, answer in enumerate(answers)]
    usage = await _usage_of(engine, body)
    return {"id": f"classify-{uuid.uuid4().hex}", **_listed(body), "data": data, "usage": usage}


async def embed(engine: Engine, body: Embedding) -> dict[str, Any]:
    """Embeddings, as numbers or as base64 of little-endian float32."""
    answers = await _answers(engine, body)
    if "embedding" not in answers[0]:
        raise Fault(400, f"{engine.name} does not embed; ask /classify")
    data = []
    for index, answer in enumerate(answers):
        values: Any = answer.pop("embedding")
        if body.encoding_format == "base64":
            values = base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
        data.append({"object": "embedding", "index": index, "embedding": values, "twin": answer})
    return {**_listed(body), "data": data, "usage": await _usage_of(engine, body)}


async def route(engine: Engine, body: Inputs) -> dict[str, Any]:
    """Where inputs go."""
    if not engine.target(body.model, body.twin.gate, body.twin.expert).routed:
        raise Fault(400, f"only {engine.name} is routed, without twin")
    found = await engine.route(body.rows)
    return {**_listed(body), "data": [{"index": index, **said} for index, said in enumerate(found)]}


def listing(engine: Engine, created: int) -> dict[str, Any]:
    """The models there are."""
    own = {"object": "model", "created": created, "owned_by": "twinmerge"}
    return {"object": "list", "data": [{"id": name, **own} for name in engine.models]}


async def _usage_of(engine: Engine, body: Inputs) -> dict[str, int]:
    tokens = await engine.count(body.rows)
    return {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}


async def _answers(engine: Engine, body: Inputs) -> list[dict[str, Any]]:
    return await engine.answer(body.rows, engine.target(body.model, body.twin.gate, body.twin.expert))


def _listed(body: Inputs) -> dict[str, Any]:
    return {"object": "list", "created": int(time.time()), "model": body.model}


def _content(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"
