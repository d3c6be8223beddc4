"""Says where weights came from: their files, what those hold, and the licence on the card beside them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from twinmerge.errors import MismatchError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.hashes import header_sha256, sha256_of

CARD = "README.md"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Recorded(BaseModel):
    """What a manifest holds: exactly typed, with whatever a later version adds."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    def content(self) -> dict[str, Any]:
        """As JSON holds it; what was not given is left out."""
        return self.model_dump(mode="json", exclude_unset=True)


class FileRecord(Recorded):
    """A file: its bytes, and the SHA-256 of all of it or of its header, which says names, shapes and dtypes alone."""

    bytes: NonNegativeInt
    sha256: Sha256 | None = None
    header_sha256: Sha256 | None = None


class InputRecord(Recorded):
    """A model that something was made from.

    Attributes:
        source: a hub id, or a path from the recipe's folder.
        bytes: of its tensors.
        licence: as its card names it.
        files: of its weights, by name.
    """

    source: str
    bytes: NonNegativeInt
    licence: str | None = None
    files: Mapping[str, FileRecord] = {}


def describe_input(checkpoint: Checkpoint, source: str, *, whole: bool = True) -> InputRecord:
    """What a manifest says of one input.

    Args:
        checkpoint: base, expert or adapter.
        source: what it is called there; see `portable`.
        whole: hash every file; else only its header.
    """
    stored = Checkpoint.open(checkpoint.path)  # what its class splits or joins is read from other files
    files = sorted({spec.file for spec in stored.specs.values()})
    return InputRecord(
        source=source,
        bytes=stored.nbytes,
        licence=licence_of(checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent),
        files={file.name: _describe_file(file, whole) for file in files},
    )


def _describe_file(file: Path, whole: bool) -> FileRecord:
    size = file.stat().st_size
    if whole:
        return FileRecord(bytes=size, sha256=sha256_of(file))
    return FileRecord(bytes=size, header_sha256=header_sha256(file))


def portable(root: Path, source: Path | str, found: Path | None = None) -> str:
    """How a source is called where another machine may read it.

    Args:
        root: the folder that paths start from.
        source: a path, or the id of a model on the hub.
        found: the model, if `source` may be a path from the working directory.

    Returns:
        A hub id or a path from `root` as it is; any other path as seen from `root`, or, where the two have no folder in
        common that would stay the same elsewhere, its last name.
    """
    given = Path(source).expanduser()
    if not given.is_absolute() and found != given.resolve():
        return str(source)
    root, path = root.resolve(), given.resolve()
    return os.path.relpath(path, root) if os.path.commonpath([root, path]) != path.anchor else path.name


def require_unchanged(entry: InputRecord, checkpoint: Checkpoint, what: str) -> None:
    """Refuse an input whose files are not those that a manifest describes.

    Args:
        entry: what `describe_input` said of it, whole.
        checkpoint: what lies there now.
        what: the input, for the message.

    Raises:
        MismatchError: naming the first file that differs.
    """
    found = describe_input(checkpoint, entry.source).files
    changed = sorted(name for name in {*found, *entry.files} if found.get(name) != entry.files.get(name))
    if changed:
        raise MismatchError(
            f"{what} {checkpoint.path} is not what the twin was built from: {changed[0]} differs from its sha256 in "
            "the manifest; put that version back, or build the twin again"
        )


def licence_of(folder: Path) -> str | None:
    """The licence that a model card's front matter names; several are joined by commas.

    Args:
        folder: of the model; the card is its README.md.

    Returns:
        As it stands there (`license_name` for `other`), None where there is no card or it names none; a card whose
        front matter cannot be read gives a line that says so, as it is no reason to stop.
    """
    card = folder / CARD
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return None
    end = next((number for number, line in enumerate(lines[1:], start=1) if line.strip() == "---"), None)
    try:
        content = yaml.safe_load("\n".join(lines[1:end])) if end else None
    except yaml.YAMLError as error:
        return f"unreadable: {CARD}: {str(error).splitlines()[0]}"
    if not isinstance(content, dict):
        return None
    named = content.get("license")
    if named == "other":
        named = content.get("license_name") or named
    return ", ".join(map(str, named if isinstance(named, list) else [named])) if named else None
