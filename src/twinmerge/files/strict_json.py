"""Reads JSON and refuses what other readers take in silence: a key that stands twice, numbers that are none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from twinmerge.errors import CheckpointError


def parse_json(raw: bytes | str, *, finite: bool = False) -> Any:
    """As `json.loads`, but everything wrong is a ValueError in one line: nesting too deep and double keys too.

    Args:
        raw: UTF-8.
        finite: refuse NaN and infinities, which JSON does not know, and numbers too large for a float.
    """
    numbers: dict[str, Any] = {"parse_constant": _refuse_constant, "parse_float": _finite} if finite else {}
    try:
        return json.loads(raw, object_pairs_hook=_unique, **numbers)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        if "integer string conversion" in str(error):  # Python's own limit
            raise ValueError("an integer has too many digits") from error
        raise


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        CheckpointError: if it holds none, or one with a key twice.
    """
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large for a number")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
