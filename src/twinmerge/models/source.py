"""An expert as a source of weights: where its folder is, and a full fine-tune under the base's parameter names."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from twinmerge.errors import RecipeError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.models.compatible import require_plausible
from twinmerge.tensors.difference import require_finite, task_vector
from twinmerge.tensors.low_rank import LowRank

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


@dataclass(frozen=True)
class Expert:
    """A full fine-tune: which stored tensor is which base parameter, and which are its head."""

    name: str
    checkpoint: Checkpoint
    stored: Mapping[str, str]
    """Base parameter name -> name in the expert's files."""
    head: Mapping[str, str]
    """Its task head, which the base does not have: name in the expert's class -> name in the expert's files."""

    @property
    def is_adapter(self) -> bool:
        """Whether task vectors come as factors."""
        return False

    def trains(self, name: str) -> bool:
        """Whether it brings a value of its own for a base parameter."""
        return name in self.stored

    def task_vector(self, name: str, base: Tensor, bound: float | None = None) -> Tensor:
        """Expert minus base, float32, shaped as `base`.

        Raises:
            CheckpointError: if the expert holds NaN, Inf or a magnitude beyond `bound`.
        """
        tensor = self.checkpoint.read(self.stored[name])
        require_plausible(tensor, self._where(self.stored[name]), bound=bound)
        return task_vector(base, tensor)

    def read_flat(self, name: str, start: int, stop: int, bound: float | None) -> Tensor:
        """Entries `start` to `stop` of the expert's own value, flattened, in its stored dtype.

        Raises:
            CheckpointError: if they hold NaN, Inf or a magnitude beyond `bound`.
        """
        tensor = self.checkpoint.read_flat(self.stored[name], start, stop)
        require_plausible(tensor, self._where(self.stored[name]), start, bound)
        return tensor

    def factors(self, name: str) -> LowRank | None:
        """Factors of the task vector of a 2-D parameter, None if there is none in factored form."""
        return None

    def read_head(self) -> dict[str, Tensor]:
        """The head's tensors, finite, in their stored dtype."""
        tensors = {}
        for name, stored in self.head.items():
            tensors[name] = self.checkpoint.read(stored)
            require_finite(tensors[name], self._where(stored))
        return tensors

    def _where(self, stored: str) -> str:
        return f"expert {self.name!r}: {stored!r} in {self.checkpoint.specs[stored].file}"

    @property
    def config(self) -> dict[str, Any]:
        """The expert's config.json."""
        return self.checkpoint.config
