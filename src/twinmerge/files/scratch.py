"""Makes folders that are gone when the program ends."""

import shutil
import tempfile
from pathlib import Path

from twinmerge.errors import CheckpointError

_HELD: list[tempfile.TemporaryDirectory[str]] = []


def scratch(nbytes: int) -> Path:
    """A folder that is gone when the program ends.

    Raises:
        CheckpointError: if so many bytes have no room there.
    """
    _HELD.append(tempfile.TemporaryDirectory(prefix="twinmerge-"))
    folder = Path(_HELD[-1].name)
    if (free := shutil.disk_usage(folder).free) < nbytes:
        raise CheckpointError(
            f"{folder.parent} must have {nbytes:,} bytes free for a model in another form, found {free:,}; "
            "name another folder in TMPDIR"
        )
    return folder
