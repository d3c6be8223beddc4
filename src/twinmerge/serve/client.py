"""Asks a server, or a folder of a twin, which is served at a free port for as long as it is asked."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinmerge.errors import InputError, TwinMergeError
from twinmerge.serve.server import listen, make_server
from twinmerge.serve.settings import ServeSettings

WAIT_S = 300.0
"""Seconds without a byte from the server after which it is given up."""


@dataclass(frozen=True)
class Client:
    """Of one server.

    Attributes:
        url: of the server, without a path.
        api_key: None if it asks for none.
    """

    url: str
    api_key: str | None = None

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            InputError: if the server refuses it.
            TwinMergeError: if there is no server, or it failed.
        """
        with self._open(path, body) as answer:
            found: dict[str, Any] = json.loads(answer.read())
            return found

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer; raises as `ask` does."""
        with self._open(path, {**body, "stream": True}) as answer:
            for line in answer:
                data = line.decode().removeprefix("data: ").strip()
                if data == "[DONE]":
                    return
                if data:
                    event = json.loads(data)
                    if "error" in event:
                        raise TwinMergeError(f"{self.url}: {event['error']['message']}")
                    yield event

    def model(self) -> str:
        """The name of the twin that it serves."""
        return str(self.ask("/version")["model"])

    def _open(self, path: str, body: Mapping[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        raw = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, raw, headers)  # http and https alone, see `client_of`
        try:
            return urllib.request.urlopen(request, timeout=WAIT_S)
        except urllib.error.HTTPError as error:
            kind = InputError if error.code < 500 else TwinMergeError
            raise kind(f"{self.url}: {_message(error)}") from error
        except OSError as error:
            raise TwinMergeError(f"{self.url} does not answer: {getattr(error, 'reason', error)}") from error


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {error.code}; is it a server of twinmerge?"


@contextmanager
def client_of(target: str, api_key: str | None = None) -> Iterator[Client]:
    """A client of what a user names: a server's address, or a twin's folder.

    Raises:
        InputError: if it is neither.
    """
    if target.startswith(("http://", "https://")):
        yield Client(target.rstrip("/").removesuffix("/v1"), api_key)
        return
    if not Path(target).is_dir():
        raise InputError(f"{target} must be a twin's folder, or the address of a server, http://HOST:PORT")
    with listen("127.0.0.1", 0) as listening:
        server = make_server(Path(target), ServeSettings(), quiet=True)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Client(f"http://127.0.0.1:{listening.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join()
