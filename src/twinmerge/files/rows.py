"""Reads rows, of text, chats or images, from JSON lines, such as can be written again, and says where one is wrong."""

import hashlib
import json
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from twinmerge.errors import DataError
from twinmerge.files.hashes import sha256_of_first
from twinmerge.files.strict_json import parse_json
from twinmerge.files.tables import DATA_URI, RowFile

Row = dict[str, Any]
"""One input: one of `INPUTS`, perhaps `text_pair`, perhaps `label`, and whatever else the file holds."""
INPUTS = ("text", "prompt", "messages", "image")
"""What a row may hold for a model to read: texts, chats, a picture."""
STANDARD = Path("-")
"""Standard input or output."""
_URLS = "http:", "https:", "ftp:"
_DEPTH = 100
"""How deep lists and objects of a row may lie in each other; what is deeper may be readable, but not writable again."""


def read_rows(path: Path | RowFile, *, labelled: bool) -> list[Row]:
    """All rows of a file; see `iter_rows`."""
    return list(iter_rows(path, labelled=labelled))


def iter_rows(path: Path | RowFile, *, labelled: bool) -> Iterator[Row]:
    """Read rows one by one from a file of JSON lines, `{"text": ..., "text_pair": ..., "label": ...}` and others.

    What else rows may come in is in `tables`: CSV, parquet, texts, folders of images.

    Instead of `text` a row may hold `prompt`, `messages`, or `image`, whose relative path starts from the file's
    folder.

    Args:
        path: the file; of JSON lines UTF-8, one object a line.
        labelled: whether each row must have a label. Then the label, a string or an
            integer in the file, is a string in the row.

    Yields:
        The rows in the file's order, all their fields kept.

    Raises:
        DataError: if the file is missing or empty, or at the first bad line.
    """
    source = path if isinstance(path, RowFile) else RowFile(path)
    with open_rows(source) as file:
        for row in RowReader(file, str(source.path), labelled=labelled):
            yield located(row, folder_of(source.path))


@contextmanager
def open_rows(source: RowFile) -> Iterator[BinaryIO]:
    """Open a file of rows as JSON lines, `-` for standard input.

    Raises:
        DataError: if it cannot be opened.
    """
    if source.path == STANDARD:
        yield sys.stdin.buffer
        return
    with source.open() as file:
        yield file


def folder_of(path: Path) -> Path:
    """Where the relative paths of a file's images start: its folder, or itself, if it is one."""
    return path if path.is_dir() else path.parent


def count_lines(source: RowFile) -> int | None:
    """Lines of a file without blank ones at its end, fast and in little memory; None where they are not its rows."""
    path = source.path
    if not path.is_file() or not source.is_lines:
        return None
    count, blank = 0, 1
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            if content := chunk.rstrip():
                count, blank = count + blank + content.count(b"\n"), 0
            blank += chunk.count(b"\n", len(content))
    return count


class RowReader:
    """Rows of an open file, one by one, and how far it has been read.

    Attributes:
        rows: rows read.
        bytes: bytes read.
    """

    def __init__(
        self,
        file: BinaryIO,
        name: str,
        *,
        labelled: bool = False,
        taken: Collection[str] = (),
    ) -> None:
        """Start at the beginning.

        Args:
            file: binary, one JSON object a line.
            name: of the file, for messages.
            labelled: as in `iter_rows`.
            taken: fields that a row may not have, since an answer has them.
        """
        self.rows = self.bytes = 0
        self._file, self._name, self._labelled, self._taken = file, name, labelled, taken
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of the bytes read."""
        return self._digest.hexdigest()

    def skip(self, rows: int, size_bytes: int, sha256: str) -> None:
        """Go on where another reader of the same file was.

        Raises:
            DataError: if the file does not begin with those bytes.
        """
        self._digest = sha256_of_first(self._file, size_bytes)
        self.rows, self.bytes = rows, size_bytes
        if self.sha256 != sha256:
            raise DataError(
                f"the first {rows:,} rows of {self._name} are not those that the interrupted run read; give that file"
            )

    def __iter__(self) -> Iterator[Row]:
        """Read on; blank lines may stand at the end.

        Raises:
            DataError: at the first bad line, or if there is none at all.
        """
        blank = False
        for line in self._file:
            where = f"{self._name}:{self.rows + 1}"
            if not line.strip():
                blank = True
                continue
            if blank:
                raise DataError(f"{where}: expected a JSON object, found an empty line; rows follow it")
            row = _parse(line, where, labelled=self._labelled)
            refuse_taken(row, self._taken, where)
            self._digest.update(line)
            self.bytes += len(line)
            self.rows += 1
            yield row
        if self.rows == 0:
            raise DataError(f"{self._name} holds no rows")


def refuse_taken(row: Row, taken: Collection[str], where: str) -> None:
    """Refuse a row whose fields would be lost among those of its answer.

    Raises:
        DataError: naming the first.
    """
    for field in row:
        if field in taken:
            raise DataError(f"{where}: the answer has a field {field!r} of its own; rename the row's")


def _parse(line: bytes, where: str, *, labelled: bool) -> Row:
    try:
        row = parse_json(line.decode("utf-8-sig"), finite=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}") from error
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    _require_writable(row, where)
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {_described(row)}")
    require_input(row, where)
    if labelled:
        if "label" not in row:
            raise DataError(f"{where}: the row lacks 'label'; found {', '.join(map(repr, row))}")
        row["label"] = _label(row["label"], where)
    return row


def require_input(row: Row, where: str) -> None:
    """Refuse a row that holds nothing a model could read, or holds it in another form.

    Where there is a text it is what counts; other fields are then handed through as they are.

    Raises:
        DataError: saying what must hold.
    """
    if not any(field in row for field in INPUTS):
        found = ", ".join(map(repr, row)) or "no fields"
        raise DataError(f"{where}: the row lacks 'text' (or 'prompt', 'messages', 'image'); found {found}")
    for field in ("text", "text_pair"):
        if not isinstance(row.get(field, ""), str):
            raise DataError(f"{where}: {field!r} must be a string, found {_described(row[field])}")
    if "text" in row:
        return
    if "image" in row:
        require_image(row["image"], where)
    if not isinstance(row.get("prompt", ""), str):
        _require_messages(row["prompt"], f"{where}: 'prompt' must be a string or")
    if "messages" in row:
        _require_messages(row["messages"], f"{where}: 'messages' must be")


def require_image(source: object, where: str) -> None:
    """Refuse what names no picture: neither a path nor a data URI, nor, in Python, bytes.

    Raises:
        DataError: saying what must hold.
    """
    if isinstance(source, bytes | Path):
        return
    if not isinstance(source, str):
        raise DataError(f"{where}: 'image' must be a string, found {_described(source)}")
    if source.startswith(_URLS):
        raise DataError(f"{where}: 'image' must be a path or a data: URI, as nothing is fetched, found {source[:60]!r}")


def located(row: Row, folder: Path) -> Row:
    """The row with its image's path, which starts from a folder, as the working directory sees it."""
    source = row.get("image")
    if not isinstance(source, str) or source.startswith((DATA_URI, *_URLS)):
        return row
    return {**row, "image": str(folder / source)}


def characters_of(row: Row) -> int:
    """How much text a row holds, chats included."""
    return sum(len(str(row.get(field, ""))) for field in (*INPUTS, "text_pair"))


def _require_messages(found: object, must: str) -> None:
    if not isinstance(found, list) or not found:
        raise DataError(f'{must} a list of {{"role": ..., "content": ...}}, found {_described(found)}')
    for message in found:
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        texts = all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts)
        if not isinstance(role, str) or not texts:
            raise DataError(
                f'{must} a list of {{"role": ..., "content": ...}}, both strings (content may be parts of type text), '
                f"found {_described(message)}"
            )


def _require_writable(row: object, where: str) -> None:
    """Refuse texts that are none, in keys and values, and what lies too deep."""
    left: list[tuple[object, str, int]] = [(row, "the row", 1)]
    while left:
        value, what, depth = left.pop()
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"{where}: {what} holds half a surrogate pair at character {error.start}") from error
        elif isinstance(value, dict | list):
            if depth > _DEPTH:
                raise DataError(f"{where}: {what} holds lists or objects more than {_DEPTH} deep")
            inner = value.items() if isinstance(value, dict) else ((what, item) for item in value)
            for key, item in inner:
                left += [(key, "a key", depth)] * isinstance(value, dict)
                left.append((item, repr(key) if depth == 1 and isinstance(value, dict) else what, depth + 1))


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
