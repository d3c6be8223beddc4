"""Makes text of tokens as they come, and ends it where it should end."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from twinmerge.hf.paged import Token

_HALF = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer gives for a letter whose bytes are not all there."""


@dataclass(frozen=True)
class Piece:
    """What a step added to a text.

    Attributes:
        text: that is certain now; "" while it may yet become something else.
        tokens: written since the last piece.
        finish: why the text ended, `stop` or `length`; None if it goes on.
    """

    text: str
    tokens: tuple[Token, ...]
    finish: str | None = None


class Reader:
    """Reads tokens of one text."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], *, ends: Collection[int], stops: Sequence[str], limit: int
    ) -> None:
        """Begin.

        Args:
            decode: makes text of ids.
            ends: ids that end a text.
            stops: strings that end it, and are not part of it.
            limit: tokens after which it ends.
        """
        self.decode, self.ends, self.stops, self.limit = decode, ends, stops, limit
        self.ids: list[int] = []
        self._read = 0
        """Ids whose text is certain."""
        self._start = 0
        """The first id that is decoded with new ones: how a token reads may depend on the one before that is seen."""
        self._held = ""

    def read(self, token: Token) -> Piece:
        """Take a token."""
        self.ids.append(token.id)
        over = token.id in self.ends
        full = len(self.ids) >= self.limit
        text = self._held + self._new(final=over or full)
        cut = min((place for stop in self.stops if (place := text.find(stop)) >= 0), default=None)
        if cut is not None:
            return Piece(text[:cut], (token,), "stop")
        if over or full:
            return Piece(text, (token,), "stop" if over else "length")
        kept = max(
            (size for stop in self.stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
        self._held = text[len(text) - kept :]
        return Piece(text[: len(text) - kept], (token,))

    def _new(self, *, final: bool) -> str:
        """The text of ids that were not read yet; none while a letter is incomplete."""
        before = self.decode(self.ids[self._start : self._read])
        whole = self.decode(self.ids[self._start :])
        if whole.endswith(_HALF) and not final:
            return ""
        new = whole[len(before) :]
        self._start, self._read = self._read if new else self._start, len(self.ids)
        return new
