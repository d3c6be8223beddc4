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
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"a server needs {error.name}: pip install 'twinmerge[serve]'") from error
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listening = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(
            f"cannot listen at {settings.host}:{settings.port}: {error.strerror}; give another --host or --port"
        ) from error
    with listening:
        _run(listening, folder, settings, device)


def _run(listening: socket.socket, folder: Path, settings: ServeSettings, device: str) -> None:
    import uvicorn

    from twinmerge.serve.app import make_app
    from twinmerge.serve.engine import load_engine

    engine = load_engine(folder, settings, device=device)
    where = f"http://{settings.host}:{listening.getsockname()[1]}"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            sys.stdout.write(f"serving {', '.join(engine.models)} at {where}\n")
            sys.stdout.flush()

    config = uvicorn.Config(
        make_app(engine),
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain_s),
    )
    before: dict[int, Any] = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGTERM, signal.SIGINT)}
    try:  # uvicorn raises the signal that stopped it once more: here that is a normal end
        Server(config).run(sockets=[listening])
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
