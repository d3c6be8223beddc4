"""What a server allows, and its defaults; imports nothing heavy."""

from dataclasses import dataclass

KEY_VARIABLE = "TWINMERGE_API_KEY"
"""Where a key is found that no option gives."""


@dataclass(frozen=True)
class ServeSettings:
    """Limits of a server; all of them are on unless they are raised.

    Attributes:
        host: address to listen at.
        port: 0 takes a free one.
        name: of the twin in requests; None is its folder's.
        api_key: without which nothing is answered but /health; None lets everybody in.
        max_batch_rows: requests in one batch or pass.
        max_batch_tokens: of one batch, padding included, or one pass over texts.
        wait_ms: a batch waits so long for more requests, milliseconds.
        max_queue: requests that are accepted and not yet answered; more get 429.
        max_new_tokens: that a request may ask for, and what it gets if it does not say.
        cache_tokens: prompts and continuations under way, together; what does not fit waits.
        max_body_bytes: of a request.
        timeout_s: seconds that a request may take, from its first byte to the last of its answer.
        drain_s: seconds that requests under way are given to finish when the server is told to stop.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    api_key: str | None = None
    max_batch_rows: int = 64
    max_batch_tokens: int = 2048
    wait_ms: float = 3.0
    max_queue: int = 256
    max_new_tokens: int = 512
    cache_tokens: int = 16384
    max_body_bytes: int = 10**6
    timeout_s: float = 120.0
    drain_s: float = 30.0
