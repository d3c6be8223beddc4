"""Knows how rows of text are read from JSON lines, and says where one is wrong."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twinmerge.errors import DataError

Row = dict[str, Any]
"""One input: `text`, perhaps `text_pair`, perhaps `label`, and whatever else the file holds."""


def read_rows(path: Path, *, labelled: bool) -> list[Row]:
    """All rows of a file of JSON lines; see `iter_rows`."""
    return list(iter_rows(path, labelled=labelled))


def iter_rows(path: Path, *, labelled: bool) -> Iterator[Row]:
    """Read rows one by one from a file of JSON lines, `{"text": ..., "text_pair": ..., "label": ...}`.

    Args:
        path: the file, UTF-8, one JSON object a line.
        labelled: whether each row must have a label. Then the label, a string or an
            integer in the file, is a string in the row.

    Yields:
        The rows in the file's order, all their fields kept.

    Raises:
        DataError: if the file is missing or empty, or at the first bad line.
    """
    try:
        with path.open("rb") as file:
            number = 0
            for number, line in enumerate(file, start=1):
                yield _parse(line, f"{path}:{number}", labelled=labelled)
    except OSError as error:
        raise DataError(f"cannot read rows from {path}: {error.strerror}") from error
    if number == 0:
        raise DataError(f"{path} holds no rows")


def _parse(line: bytes, where: str, *, labelled: bool) -> Row:
    if not line.strip():
        raise DataError(f"{where}: expected a JSON object, found an empty line")
    try:
        row = json.loads(line.decode("utf-8-sig"), parse_constant=_reject_constant)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}") from error
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {_described(row)}")
    if "text" not in row:
        raise DataError(f"{where}: the row lacks 'text'; found {', '.join(map(repr, row)) or 'no fields'}")
    for field in ("text", "text_pair"):
        if field in row:
            _check_text(row[field], f"{where}: {field!r}")
    if labelled:
        if "label" not in row:
            raise DataError(f"{where}: the row lacks 'label'; found {', '.join(map(repr, row))}")
        row["label"] = _label(row["label"], where)
    return row


def _check_text(value: object, what: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, found {_described(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} holds half a surrogate pair at character {error.start}") from error


def _label(value: object, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value and "\x00" not in value:
        return value
    raise DataError(f"{where}: 'label' must be a non-empty string or an integer, found {_described(value)}")


def _described(value: object) -> str:
    """The value as JSON, shortened."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
