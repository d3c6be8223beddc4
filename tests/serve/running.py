"""Servers in this process, at free ports of 127.0.0.1, and plain requests to them."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from twinmerge.hf.model import TwinModel
from twinmerge.serve.app import make_app
from twinmerge.serve.engine import Engine
from twinmerge.serve.metrics import Metrics
from twinmerge.serve.settings import ServeSettings

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@dataclass(frozen=True)
class Running:
    """A server."""

    engine: Engine
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON (or text) of a request; bytes go as they are."""
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, raw, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        try:
            return status, json.loads(content)
        except ValueError:
            return status, content.decode()

    def refused(self, path: str, body: Any, **headers: str) -> tuple[int, str]:
        """Status and message of a request that gets no answer, in OpenAI's form."""
        status, content = self.ask(path, body, **headers)
        assert set(content["error"]) == {"message", "type", "param", "code"}
        return status, content["error"]["message"]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def counted(self, name: str) -> float:
        """A figure of /metrics."""
        lines = self.ask("/metrics")[1].splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + " ", name + "{")))


def post(path: str, body: Any) -> bytes:
    """A request as it goes over the wire."""
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


def until(what: Any, seconds: float = 10.0) -> bool:
    """Whether something becomes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.02)
    return False


@contextmanager
def running(model: TwinModel, **settings: Any) -> Iterator[Running]:
    """A server for a twin called `tiny`."""
    chosen = ServeSettings(**{"max_new_tokens": 4096, "max_batch_tokens": 256, "cache_tokens": 8192, **settings})
    engine = Engine(model, "tiny", chosen, Metrics())
    server = uvicorn.Server(uvicorn.Config(make_app(engine), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert until(lambda: server.started)
        yield Running(engine, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
