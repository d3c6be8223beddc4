"""Where what can be made again is kept: `$TWINMERGE_CACHE`, by default ~/.cache/twinmerge."""

import os
from pathlib import Path

CACHE_VARIABLE, DEFAULT_CACHE = "TWINMERGE_CACHE", "~/.cache/twinmerge"


def cache_folder() -> Path:
    """The cache of this user; it may not exist yet."""
    return Path(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE).expanduser().resolve()
