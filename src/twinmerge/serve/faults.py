"""What a server says when it does not answer, in OpenAI's form."""

from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Fault(Exception):  # noqa: N818 - an answer, not a failure of the program
    """A request that gets no answer, and why."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        """Say why.

        Args:
            status: of HTTP: 400 cannot be honoured, 401, 404, 413 too large, 429 queue full, 500, 503 stopping, 504.
            message: for people, one line.
            code: for programs.
            param: the field of the request that is to blame.
        """
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """That go with the status."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status in (429, 503) else {}


class GoneError(Exception):
    """Nobody waits for the answer any more."""
