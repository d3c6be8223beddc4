"""The HTTP side of a server: routes, keys, limits, and what is counted and logged of every request."""

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Any, TextIO, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twinmerge import __version__
from twinmerge.errors import InputError
from twinmerge.serve import answers
from twinmerge.serve.bodies import Body, Chat, Completion, Embedding, Inputs, read_body
from twinmerge.serve.engine import Engine
from twinmerge.serve.faults import Fault, GoneError

_OPEN = frozenset({"/health", "/", "/page.css", "/page.js"})
"""What needs no key: whether the server is well, and the page, which holds no data."""
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_GUARDS = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}
Kind = TypeVar("Kind", bound=Body)
Result = TypeVar("Result")


def make_app(engine: Engine, *, log: TextIO | None = None) -> ASGIApp:
    """An ASGI application that answers with an engine, which it starts and stops.

    Args:
        engine: not started yet.
        log: where a line of JSON a request goes; nothing of what was asked is in it.
    """
    created = int(time.time())

    def json_route(path: str, kind: type[Kind], answer: Callable[[Engine, Kind], Awaitable[dict[str, Any]]]) -> Route:
        async def handle(request: Request) -> Response:
            body = await _body(request, kind, engine.settings.max_body_bytes)
            return JSONResponse(await _while_waited_for(request.receive, answer(engine, body)))

        return Route(path, handle, methods=["POST"])

    def text_route(path: str, kind: type[Chat | Completion]) -> Route:
        async def handle(request: Request) -> Response:
            body = await _body(request, kind, engine.settings.max_body_bytes)
            writing = await _while_waited_for(request.receive, answers.Draft.begin(engine, body))
            if body.stream:
                return _Stream(writing.stream())
            return JSONResponse(await _while_waited_for(request.receive, writing.whole()))

        return Route(path, handle, methods=["POST"])

    async def models(_: Request) -> Response:
        return JSONResponse(answers.listing(engine, created))

    async def health(_: Request) -> Response:
        if not engine.ready:
            raise Fault(503, "texts are no longer written; restart the server")
        return JSONResponse({"status": "ok"})

    async def version(_: Request) -> Response:
        return JSONResponse({"version": __version__, **engine.about})

    async def metrics(_: Request) -> Response:
        return Response(engine.metrics.page(), media_type="text/plain; version=0.0.4")

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(engine.stop)

    app = Starlette(
        routes=[
            Route("/v1/models", models),
            text_route("/v1/chat/completions", Chat),
            text_route("/v1/completions", Completion),
            json_route("/v1/embeddings", Embedding, answers.embed),
            json_route("/classify", Inputs, answers.classify),
            json_route("/v1/route", Inputs, answers.route),
            Route("/health", health),
            Route("/version", version),
            Route("/metrics", metrics),
            *(_page(path, *page) for path, page in _PAGE.items()),
        ],
        exception_handlers={
            Fault: _refused,
            InputError: _unusable,
            HTTPException: _unknown,
            GoneError: _gone,
            ClientDisconnect: _gone,
        },
        lifespan=lifespan,
    )
    return _Gate(app, engine, log)


class _Gate:
    """Around all routes: key, queue, time, and what is counted and logged."""

    def __init__(self, app: ASGIApp, engine: Engine, log: TextIO | None) -> None:
        self.app, self.engine, self.settings, self.log = app, engine, engine.settings, log
        self.waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name, began, status = uuid.uuid4().hex, time.monotonic(), 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = {"X-Request-Id": name, **_GUARDS}
                message["headers"] += [(key.lower().encode(), value.encode()) for key, value in more.items()]
            await send(message)

        counted = scope["path"] not in (*_OPEN, "/metrics")
        self.waiting += counted
        self.engine.metrics.queue.set(self.waiting)
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                self._admit(scope, counted)
                await self.app(scope, receive, sent)
        except Fault as fault:
            await JSONResponse(fault.body, fault.status, fault.headers)(scope, receive, sent)
        except TimeoutError:
            if status:  # the answer has begun: all that is left is to close the connection
                self._log(id=name, error=f"took longer than {self.settings.timeout_s:g} s")
                return
            late = Fault(504, f"the request took longer than {self.settings.timeout_s:g} s", code="timeout")
            await JSONResponse(late.body, late.status)(scope, receive, sent)
        except Exception as error:  # noqa: BLE001 - logged; other requests go on
            if not status:
                failed = Fault(500, f"the server failed at this request, {name}")
                await JSONResponse(failed.body, failed.status)(scope, receive, sent)
            self._log(id=name, error=f"{type(error).__name__}: {error}")
        finally:
            self.waiting -= counted
            self.engine.metrics.queue.set(self.waiting)
            self._count(scope, name, status, time.monotonic() - began)

    def _admit(self, scope: Scope, counted: bool) -> None:
        """Refuse those without the key, and those for whom there is no place."""
        if self.settings.api_key is not None and scope["path"] not in _OPEN:
            given = next((value for key, value in scope["headers"] if key == b"authorization"), b"")
            if not hmac.compare_digest(given, b"Bearer " + self.settings.api_key.encode()):
                raise Fault(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")
        if counted and self.waiting > self.settings.max_queue:
            raise Fault(429, f"{self.settings.max_queue} requests wait already; try again", code="queue_full")

    def _count(self, scope: Scope, name: str, status: int, seconds: float) -> None:
        known = scope.get("route")
        route = known.path if isinstance(known, Route) else "other"
        self.engine.metrics.requests.labels(route, str(status or 499)).inc()
        self.engine.metrics.seconds.labels(route).observe(seconds)
        self._log(id=name, method=scope["method"], route=route, status=status or 499, seconds=round(seconds, 4))

    def _log(self, **said: Any) -> None:
        if self.log is not None:
            self.log.write(json.dumps({"time": round(time.time(), 3), **said}) + "\n")


class _Stream(Response):
    """Server-sent events, ended when their reader is gone."""

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        self.events, self.status_code, self.background = events, 200, None
        self.init_headers({"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def run() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self.events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await _while_waited_for(receive, run())
        except GoneError:
            return
        finally:
            await self.events.aclose()


async def _while_waited_for(receive: Receive, work: Coroutine[Any, Any, Result] | Awaitable[Result]) -> Result:
    """The result of some work, which ends when the client is gone.

    Raises:
        GoneError: if it is.
    """

    async def leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(leaves())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GoneError
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(task, gone, return_exceptions=True)


async def _body(request: Request, kind: type[Kind], limit: int) -> Kind:
    """What a request holds, never more than the limit of it in memory."""
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > limit:
            raise Fault(413, f"the body must hold {limit:,} bytes at most", code="body_too_large")
    return read_body(kind, bytes(raw))


def _page(path: str, file: str, kind: str) -> Route:
    """One of the page's files, read now: no request reaches the file system."""
    content = (files("twinmerge.serve") / "page" / file).read_bytes()

    async def handle(_: Request) -> Response:
        return Response(content, media_type=kind)

    return Route(path, handle)


async def _refused(_: Request, fault: Exception) -> Response:
    assert isinstance(fault, Fault)
    return JSONResponse(fault.body, fault.status, fault.headers)


async def _unusable(_: Request, error: Exception) -> Response:
    return JSONResponse(Fault(400, str(error)).body, 400)


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    fault = Fault(error.status_code, f"{request.method} here: {error.detail}")
    return JSONResponse(fault.body, fault.status, error.headers)


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)
