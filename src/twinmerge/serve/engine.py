"""Answers requests with one twin: routes them, labels, embeds and writes, each under a gate of its own."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import InputError
from twinmerge.files.rows import Row
from twinmerge.files.tables import DATA_URI
from twinmerge.hf.answers import CONTINUATION, Answer, require_texts
from twinmerge.hf.batches import BatchLimits
from twinmerge.hf.generate import end_ids, stops_of
from twinmerge.hf.inputs import batches_of, encode, fault_of, is_chat, length_limit, pad, require_readable, tokenizer_of
from twinmerge.hf.model import TwinModel
from twinmerge.hf.paged import PagedWriter, Wish
from twinmerge.jobs.answering import answers_by_expert, ways_of
from twinmerge.jobs.predict import predict
from twinmerge.serve.batches import Gathered
from twinmerge.serve.faults import Fault
from twinmerge.serve.metrics import Metrics
from twinmerge.serve.settings import ServeSettings
from twinmerge.serve.texts import Piece, Reader

SHARED = "shared"
"""Of `NAME:shared`, the shared expert alone."""


@dataclass(frozen=True)
class Target:
    """Who answers.

    Attributes:
        model: the name in the request.
        gate: expert -> weight, others are 0; None is the router's, or `expert` alone.
        expert: whose head, tokenizer and end tokens; None follows from the gate.
    """

    model: str
    gate: tuple[tuple[str, float], ...] | None = None
    expert: str | None = None

    @property
    def routed(self) -> bool:
        """Whether the router says who answers."""
        return self.gate is None and self.expert is None


@dataclass(frozen=True)
class Routed:
    """Where one input goes.

    Attributes:
        gate: (expert,).
        expert: whose settings hold; None are the base's.
        said: what an answer says of it.
    """

    gate: Tensor
    expert: str | None
    said: dict[str, Any]


@dataclass(frozen=True)
class Text:
    """A text about to be written.

    Attributes:
        prompt_tokens: of the prompt.
        said: who writes it.
        pieces: what is written; leaving them ends the work.
        spell: a token as text.
    """

    prompt_tokens: int
    said: dict[str, Any]
    pieces: AsyncGenerator[Piece]
    spell: Callable[[int], str]


class Engine:
    """A loaded twin and the threads that answer with it."""

    def __init__(self, model: TwinModel, name: str, settings: ServeSettings, metrics: Metrics) -> None:
        """Prepare; `start` starts.

        Args:
            model: the twin.
            name: in requests.
            settings: limits.
            metrics: what is counted.

        Raises:
            MismatchError: if it writes texts, and not in a way that they can share a batch.
        """
        self.model, self.name, self.settings, self.metrics = model, name, settings, metrics
        self.kinds = answers_by_expert(model)
        self.writes = CONTINUATION in self.kinds.values()
        self.limits = BatchLimits(settings.max_batch_rows, settings.max_batch_tokens)
        self.writer = None
        if self.writes:
            self.writer = PagedWriter(
                model,
                batch_tokens=settings.max_batch_tokens,
                cache_tokens=settings.cache_tokens,
                texts=settings.max_batch_rows,
            )
        self._threads = ThreadPoolExecutor(1, "answers")
        gather: Any = partial(
            Gathered,
            executor=self._threads,
            rows=settings.max_batch_rows,
            wait_s=settings.wait_ms / 1000,
            told=metrics.batch_rows.observe,
        )
        self._routes: Gathered[Row, Routed] = gather(self._route)
        self._answers: Gathered[tuple[Row, Target], Answer] = gather(self._predict)

    def start(self) -> None:
        """Start the thread that writes."""
        if self.writer is not None:
            self.writer.start()

    def stop(self) -> None:
        """End all threads."""
        if self.writer is not None:
            self.writer.stop()
        self._threads.shutdown(cancel_futures=True)

    @property
    def ready(self) -> bool:
        """Whether requests can be answered."""
        return self.writer is None or self.writer.running

    @property
    def models(self) -> list[str]:
        """Names that requests may ask for."""
        routed = [self.name] if self.model.router is not None else []
        shared = [] if self.model.heads else [f"{self.name}:{SHARED}"]
        return [*routed, *shared, *(f"{self.name}:{expert}" for expert in self.model.expert_names)]

    @property
    def about(self) -> dict[str, Any]:
        """What the twin is: its name and experts, what it reads, how it answers, whether it routes and has heads."""
        kinds = sorted({kind.kind for kind in self.kinds.values()})
        return {
            "model": self.name,
            "experts": list(self.model.expert_names),
            "reads": "images" if self.model.reads_images else "texts",
            "answers": kinds[0] if len(kinds) == 1 else "several",
            "routes": self.model.router is not None,
            "heads": bool(self.model.heads),
        }

    def target(self, model: str, gate: Mapping[str, float] | None, expert: str | None) -> Target:
        """Who answers a request.

        Args:
            model: the name that it asks for.
            gate: expert -> weight, its own; None where it gives none.
            expert: whose head answers.

        Raises:
            Fault: 404 for an unknown model, 400 for a gate or an expert that cannot be.
        """
        name, _, who = model.partition(":")
        known = self.model.expert_names
        if name != self.name or (":" in model and who != SHARED and who not in known):
            raise Fault(
                404, f"there is no model {model[:200]!r}; known are {', '.join(self.models)}", code="model_not_found"
            )
        for one in [*(gate or ()), *([] if expert is None else [expert])]:
            if one not in known:
                raise Fault(400, f"unknown expert {one[:200]!r}; this twin has {', '.join(known)}", param="twin")
        if who and (gate is not None or (expert is not None and who != SHARED)):
            raise Fault(400, f"{model} says who answers already; give twin to {self.name}", param="twin")
        if who == SHARED:
            gate = {}
        elif who:
            expert = who
        if gate is not None and expert is None and any(gate.values()):
            expert = max(sorted(gate), key=lambda one: gate[one])
        if self.model.heads and gate is not None and expert is None:
            raise Fault(400, "the shared expert has no head; say whose answers: twin.expert", param="twin")
        if gate is None and expert is None and self.model.router is None:
            raise Fault(400, f"this twin has no router; ask for one of {', '.join(self.models)}, or give twin.gate")
        weights = None if gate is None else tuple(sorted(gate.items()))
        return Target(model, weights, expert)

    async def route(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Where inputs go."""
        if self.model.router is None:
            raise Fault(400, "this twin has no router")
        return [routed.said for routed in await self._routes.ask(self._readable(rows))]

    async def answer(self, rows: Sequence[Row], target: Target) -> list[Answer]:
        """What `predict` says of rows."""
        if self.writes:
            raise Fault(400, f"{self.name} writes texts; ask /v1/chat/completions or /v1/completions")
        rows = self._readable(rows)
        if len(kinds := set(self.kinds.values())) == 1:
            for row in rows:
                _refusing(require_texts, next(iter(kinds)), row, "the request")
        found = await self._answers.ask([(row, target) for row in rows])
        for answer in found:
            self.metrics.routed(answer["gate"], answer["fallback"])
        return found

    async def count(self, rows: Sequence[Row]) -> int:
        """Tokens that the router reads of rows; pictures have none."""
        if self.model.reads_images:
            return 0
        encoded = await asyncio.to_thread(encode, self.model, rows)
        return sum(len(one["input_ids"]) for one in encoded)

    async def text(self, row: Row, target: Target, wish: Wish, stops: Sequence[str], *, asked: bool) -> Text:
        """Begin a text.

        Args:
            row: prompt or messages.
            target: who writes.
            wish: how.
            stops: strings that end it.
            asked: whether the request names the length, which is cut to what is possible where it does not.

        Raises:
            Fault: 400 if it cannot be written: no template, too long.
        """
        if self.writer is None:
            raise Fault(400, f"{self.name} writes no texts; ask /classify or /v1/embeddings")
        if not self.ready:
            raise Fault(503, "texts are no longer written; restart the server")
        routed = (await self._routes.ask([row]))[0] if target.routed else self._given(target)
        tokenizer = tokenizer_of(self.model, routed.expert)
        if is_chat(row) and not tokenizer.chat_template:
            raise Fault(400, "messages need a chat template, which this tokenizer has not; ask /v1/completions")
        encoded = (await asyncio.to_thread(encode, self.model, [row], expert=routed.expert))[0]["input_ids"]
        room = min(length_limit(self.model) or self.settings.cache_tokens, self.settings.cache_tokens) - len(encoded)
        if room < (wish.max_new_tokens if asked else 1):
            most = room + len(encoded)
            wanted = f" and {wish.max_new_tokens} new ones" if asked else ""
            raise Fault(
                400,
                f"a prompt of {len(encoded)} tokens or more{wanted} is too long: there is room for {most} together",
                code="context_length_exceeded",
            )
        wish = replace(wish, max_new_tokens=min(wish.max_new_tokens, room))
        own = self.model.own_of(routed.expert).generation or self.model.backbone.generation_config
        decode = partial(tokenizer.decode, skip_special_tokens=True)
        reader = Reader(decode, ends=end_ids(own), stops=[*stops, *stops_of(own)], limit=wish.max_new_tokens)
        self.metrics.routed(routed.said["gate"], bool(routed.said["fallback"]))
        return Text(len(encoded), routed.said, self._pieces(encoded, routed, wish, reader), tokenizer.decode)

    async def _pieces(self, prompt: list[int], routed: Routed, wish: Wish, reader: Reader) -> AsyncGenerator[Piece]:
        assert self.writer is not None
        self.metrics.tokens.labels("prompt").inc(len(prompt))
        async with contextlib.aclosing(self.writer.write(prompt, routed.gate, routed.expert, wish)) as tokens:
            async for token in tokens:
                self.metrics.tokens.labels("completion").inc()
                piece = reader.read(token)
                yield piece
                if piece.finish is not None:
                    return

    def _readable(self, rows: Sequence[Row]) -> list[Row]:
        """Rows as the twin reads them.

        Raises:
            Fault: 400 for what is no picture where pictures are read; a path is none.
        """
        if not self.model.reads_images:
            for row in rows:
                _refusing(require_readable, self.model, row, "the request")
            return list(rows)
        pictures = [{"image": row["text"]} for row in rows]
        for picture in pictures:
            if not picture["image"].startswith(DATA_URI):
                raise Fault(400, "this twin reads pictures: input must be a data URI, data:image/...;base64,...")
            if fault := fault_of(self.model, picture):
                raise Fault(400, fault[:300])
        return pictures

    def _given(self, target: Target) -> Routed:
        """Of a request that says who answers."""
        weights = {target.expert: 1.0} if target.gate is None else dict(target.gate)
        gate = torch.tensor([weights.get(name, 0.0) for name in self.model.expert_names], device=self.model.device)
        said = ways_of(self.model.expert_names, [target.expert], gate[None], [False], None)[0]
        return Routed(gate, target.expert, {**said, "confidence": None})

    def _route(self, rows: Sequence[Row]) -> list[Routed]:
        """A batch of inputs."""
        encoded = encode(self.model, rows)
        found: dict[int, Routed] = {}
        for chosen in batches_of(self.model, encoded, self.limits):
            routing = self.model.routing(**pad(self.model, [encoded[index] for index in chosen]))
            names = [self.model.expert_names[expert] for expert in routing.expert.tolist()]
            fallback = routing.fallback.tolist()
            said = ways_of(self.model.expert_names, names, routing.gate, fallback, routing.probability)
            for place, index in enumerate(chosen):
                found[index] = Routed(routing.gate[place], names[place], said[place])
        return [found[index] for index in range(len(rows))]

    def _predict(self, asked: Sequence[tuple[Row, Target]]) -> list[Answer]:
        """A batch of rows, those for one target together."""
        found: list[Answer] = [{}] * len(asked)
        ways = [replace(target, model="") for _, target in asked]
        for way in dict.fromkeys(ways):
            places = [place for place, own in enumerate(ways) if own == way]
            gate = None if way.gate is None else dict(way.gate)
            rows = [asked[place][0] for place in places]
            answers = predict(self.model, rows, expert=way.expert, gate=gate, limits=self.limits)
            for place, answer in zip(places, answers, strict=True):
                own = asked[place][0]
                found[place] = {name: value for name, value in answer.items() if name not in own}
        return found


def load_engine(folder: Path | str, settings: ServeSettings, *, device: str = "cpu") -> Engine:
    """An engine for a twin's folder.

    Raises:
        InputError: if the folder is no twin that can be served.
    """
    path = Path(folder).resolve()
    name = settings.name or path.name
    if ":" in name or not name:
        raise InputError(f"the twin's name in requests must be without a colon, found {name!r}; give --name")
    model = TwinModel.from_pretrained(path, device=device)
    if SHARED in model.expert_names:
        raise InputError(f"an expert is named {SHARED!r}, which in requests is the shared expert; rename it")
    return Engine(model, name, settings, Metrics())


def _refusing(check: Callable[..., None], *arguments: Any) -> None:
    """A refusal of `check` as one of the request."""
    try:
        check(*arguments)
    except InputError as error:
        raise Fault(400, str(error)) from error
