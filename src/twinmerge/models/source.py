"""Finds a model folder: a path, or a hub id that is fetched."""

import re
from pathlib import Path

from twinmerge.errors import RecipeError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "*.model", "README.md"]


def locate(root: Path, source: str, key: str) -> Path:
    """Find a model folder: under `root`, absolute, or on the hub; see `Recipe.locate` of twin/recipe.py."""
    path = (root / Path(source).expanduser()).resolve()
    if path.exists():
        return path
    beside = (root / Path(source).parts[0]).exists() if source else False
    if not _HUB_ID.fullmatch(source) or source.startswith(".") or beside:
        raise RecipeError(f"{key}: no file or folder {path}; paths start from the recipe's folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=_DOWNLOADED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise RecipeError(f"{key}: {path} is not there and hub id {source!r} cannot be fetched: {error}") from error
