"""What long work tells of itself."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and of how much."""


def silent(stage: str, done: int, total: int) -> None:
    """Progress that is not shown."""
