"""Makes lines of JSON of what rows come in elsewhere: CSV, parquet, plain text, folders of images, hub datasets."""

import base64
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from twinmerge.errors import DataError, MissingExtraError

_HUB = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([\w./-]+?))?/(.+)")
IMAGES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
_LONGEST_CELL = 1 << 27
DATA_URI = "data:"


@dataclass(frozen=True)
class RowFile:
    """Where rows are.

    Attributes:
        path: a file of JSON lines, of one of `FORMATS`, or a folder of images.
        columns: field of a row -> the column that it is.
    """

    path: Path
    columns: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, words: str, root: Path = Path()) -> "RowFile":
        """Read `PATH`, `PATH#column`, `PATH#text=column,text_pair=column` or `hf://datasets/OWNER/NAME/FILE`.

        A column alone is the row's `text`. What is on the hub is fetched.

        Args:
            words: what a recipe or a command line says.
            root: where relative paths start.

        Raises:
            DataError: if the words are of another form, or the file cannot be fetched.
        """
        whole = root / Path(words).expanduser()
        if "#" not in words or whole.exists():
            return cls(_local(words, whole))
        place, _, named = words.rpartition("#")
        pairs = [part.strip().rpartition("=") for part in named.split(",")]
        if not place or not all(column for _, _, column in pairs):
            raise DataError(f"{words}: after # stands a column, or text=column,text_pair=column")
        return cls(
            _local(place, root / Path(place).expanduser()), {name or "text": column for name, _, column in pairs}
        )

    @property
    def is_lines(self) -> bool:
        """Whether it is JSON lines as they are."""
        return not self.columns and not self.path.is_dir() and self.path.suffix.lower() not in FORMATS

    def open(self) -> BinaryIO:
        """JSON lines, one a row; of JSON lines without named columns the file itself.

        Raises:
            DataError: if it cannot be opened, or lacks a column.
        """
        try:
            if self.is_lines:
                return self.path.open("rb")
            self.path.stat()
            read = _images if self.path.is_dir() else FORMATS.get(self.path.suffix.lower(), _lines)
            return io.BufferedReader(_Lines(self._renamed(read(self.path))))
        except OSError as error:
            raise DataError(f"cannot read rows from {self.path}: {error.strerror}") from error

    def _renamed(self, rows: Iterator[dict[str, Any]]) -> Iterator[bytes]:
        for row in rows:
            if lacking := [column for column in self.columns.values() if column not in row]:
                raise DataError(f"{self.path} has no column {lacking[0]!r}; its columns are {', '.join(map(str, row))}")
            taken = {column: value for column, value in row.items() if column not in self.columns.values()}
            named = {name: row[column] for name, column in self.columns.items()}
            line = json.dumps(_flat({**taken, **named}), ensure_ascii=False, default=_plain)
            yield line.encode("utf-8", errors="surrogatepass") + b"\n"


def _local(words: str, path: Path) -> Path:
    """The path, or what the hub keeps under those words."""
    hub = _HUB.fullmatch(words)
    if hub is None:
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(hub[1], hub[3], repo_type="dataset", revision=hub[2]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(f"{words} cannot be fetched: {error}") from error


def _table(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a CSV or TSV file with a header; empty cells are left out."""
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            for number, row in enumerate(reader, start=1):
                if None in row:
                    raise DataError(f"{path}:{number}: the row has more cells than the header")
                yield {name: value for name, value in row.items() if value not in (None, "")}
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no table in UTF-8: {error}") from error
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file; images as datasets of the hub keep them, bytes beside a path, become data URIs."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtraError(f"{path} is read with pyarrow: pip install 'twinmerge[parquet]'") from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):
            yield from batch.to_pylist()
    except ArrowException as error:
        raise DataError(f"{path} is no parquet file: {error}") from error


def _text(path: Path) -> Iterator[dict[str, Any]]:
    """A row for every line that is not blank."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from ({"text": line.rstrip("\r\n")} for line in file if line.strip())
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error}") from error


def _images(folder: Path) -> Iterator[dict[str, Any]]:
    """A row for every image in a folder, in the order of their names; the folder that one lies in is its label."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    if not found:
        raise DataError(f"{folder} is a folder without images, and rows come in a file")
    for path in found:
        label = {} if path.parent == folder else {"label": path.parent.name}
        yield {"image": str(path.relative_to(folder)), **label}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of JSON lines, whose fields are renamed."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: expected a JSON object, found {str(row)[:40]}")
            yield row


FORMATS: Mapping[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
    ".txt": _text,
}
"""What is read by the suffix of its name; everything else is JSON lines."""


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """The row with an image's bytes, or its path, in the place of both."""
    image = row.get("image")
    if not isinstance(image, Mapping) or not {"bytes", "path"} & image.keys():
        return row
    return {**row, "image": image.get("bytes") or image.get("path")}


def _plain(value: object) -> Any:
    """What JSON has no word for."""
    if isinstance(value, bytes):
        return f"{DATA_URI}image;base64," + base64.b64encode(value).decode()
    return str(value)


class _Lines(io.RawIOBase):
    """A stream of lines that are made as they are read."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._left, self._made = lines, b""

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer from the next lines."""
        if not self._made:
            self._made = next(self._left, b"")
        count = min(len(buffer), len(self._made))
        buffer[:count], self._made = self._made[:count], self._made[count:]
        return count
