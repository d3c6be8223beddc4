"""Says where weights came from: their files, what those hold, and the licence on the card beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from twinmerge.errors import MismatchError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.hashes import header_sha256, sha256_of

CARD = "README.md"


def describe_input(checkpoint: Checkpoint, *, whole: bool = True) -> dict[str, Any]:
    """What a manifest says of one input.

    Args:
        checkpoint: base, expert or adapter.
        whole: hash every file; else only its header, which says names, shapes and dtypes but not values.

    Returns:
        `source`, `bytes` of its tensors, `licence` (None where the card names none), and `files` by name: `bytes`,
        and `sha256` or `header_sha256`.
    """
    files = sorted({spec.file for spec in checkpoint.specs.values()})
    return {
        "source": str(checkpoint.path),
        "bytes": checkpoint.nbytes,
        "licence": licence_of(checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent),
        "files": {
            file.name: {
                "bytes": file.stat().st_size,
                **({"sha256": sha256_of(file)} if whole else {"header_sha256": header_sha256(file)}),
            }
            for file in files
        },
    }


def require_unchanged(entry: Mapping[str, Any], checkpoint: Checkpoint, what: str) -> None:
    """Refuse an input whose files are not those that a manifest describes.

    Args:
        entry: what `describe_input` said of it, whole.
        checkpoint: what lies there now.
        what: the input, for the message.

    Raises:
        MismatchError: naming the first file that differs.
    """
    found = describe_input(checkpoint)["files"]
    changed = sorted(name for name in {*found, *entry["files"]} if found.get(name) != entry["files"].get(name))
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
