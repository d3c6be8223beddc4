"""Runs a server until it is told to stop; requests under way are finished first."""

import signal
import socket
import sys
from pathlib import Path
from typing import Any

from twinmerge.errors import InputError, MissingExtraError
from twinmerge.serve.settings import ServeSettings


def serve(folder: Path, settings: ServeSettings, *, device: str = "cpu") -> None:
    """Serve a twin; comes back after SIGTERM or SIGINT, once what was under way is answered.

    Args:
        folder: of the twin.
        settings: address and limits.
        device: where it computes.

    Raises:
        MissingExtraError: if what a server needs is not installed.
        InputError: if the twin cannot be served, or the address not be listened at.
    """
    with listen(settings.host, settings.port) as listening:
        server = make_server(folder, settings, device=device)
        before: dict[int, Any] = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGTERM, signal.SIGINT)}
        try:  # uvicorn raises the signal that stopped it once more: here that is a normal end
            server.run(sockets=[listening])
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


def listen(host: str, port: int) -> socket.socket:
    """A socket to serve at, before anything is loaded.

    Raises:
        InputError: if the address cannot be listened at.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(f"cannot listen at {host}:{port}: {error.strerror}; give another --host or --port") from error


def make_server(folder: Path, settings: ServeSettings, *, device: str = "cpu", quiet: bool = False) -> Any:
    """A server of uvicorn's that says on stdout where it answers, once it does.

    Args:
        folder: of the twin.
        settings: limits.
        device: where it computes.
        quiet: say nothing, and log no requests.
    """
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise MissingExtraError(f"a server needs {error.name}: pip install 'twinmerge[serve]'") from error
    from twinmerge.serve.app import make_app
    from twinmerge.serve.engine import load_engine

    engine = load_engine(folder, settings, device=device)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if not quiet and sockets:
                where = f"http://{settings.host}:{sockets[0].getsockname()[1]}"
                sys.stdout.write(f"serving {', '.join(engine.models)} at {where}\n")
                sys.stdout.flush()

    app = make_app(engine, log=None if quiet else sys.stderr)
    drain = int(settings.drain_s)
    config = uvicorn.Config(
        app, log_level="error", access_log=False, server_header=False, timeout_graceful_shutdown=drain
    )
    return Server(config)
