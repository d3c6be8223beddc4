"""Where weights come from: a folder or hub id, a model under the names of its class, an expert under the base's."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from twinmerge.errors import MismatchError, RecipeError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.models.compatible import require_plausible, require_values
from twinmerge.tensors.difference import require_finite, task_vector
from twinmerge.tensors.low_rank import LowRank

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md"]


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
class Layout:
    """What the class of a model says of its tensors.

    Attributes:
        cls: the class's name.
        backbone: the name of its backbone's class; its own where it has no head.
        root: what the names of its backbone's tensors begin with; what lies outside is its head.
        shapes: of every tensor, by the class's name for it.
        required: names that no folder may lack.
        tied: names -> the name whose tensor they share.
        speaks: whether its output layer is over the vocabulary, which experts of one class share.
        answers: whether it is a class with a head.
        vocabulary: names that have a row for every token, of its input and its output layer.
    """

    cls: str
    backbone: str
    root: str
    shapes: Mapping[str, tuple[int, ...]]
    required: frozenset[str]
    tied: Mapping[str, str]
    speaks: bool
    answers: bool = False
    vocabulary: tuple[str, ...] = ()


@runtime_checkable
class Library(Protocol):
    """Knows classes; hf has the one for transformers.

    In each method `folder` is where the config.json is, and `cls` a class that it fits, None for the one it names.
    """

    def by_class(self, stored: Checkpoint, folder: Path, cls: str | None) -> tuple[Checkpoint, Layout, tuple[str, ...]]:
        """A checkpoint under the names of a class's tensors, the class, and names for which it has no place."""
        ...

    def names(self, folder: Path, cls: str | None, stored: Iterable[str]) -> tuple[Layout, dict[str, str], bool]:
        """A class, its own names for some that files hold, and whether it would split or join others."""
        ...

    def merged(self, folder: Path, base: Checkpoint, config: Mapping[str, Any]) -> Path:
        """A full model of an adapter of any kind, in a folder that is gone when the program ends."""
        ...

    def class_for(self, folder: Path, task: str) -> str | None:
        """The class that a task type of PEFT's means for a folder's config; None is the one that it names."""
        ...

    def tokens(self, folder: Path, like: Path) -> dict[str, int] | None:
        """What a folder's tokenizer knows, and the ids; None if there is none, or it is the other folder's."""
        ...


@dataclass(frozen=True)
class Model:
    """A full model under the names of its class's tensors."""

    checkpoint: Checkpoint
    layout: Layout
    left_out: tuple[str, ...]
    """Stored floats for which the class has no place, and which it therefore does not use."""


def open_model(path: Path, library: Library, like: Path | None = None, cls: str | None = None) -> Model:
    """Open a full model, from headers only; tensors that are stored twice for being tied are read.

    Args:
        path: its folder.
        library: knows its class.
        like: where the config is, if the folder has none or it names no class.
        cls: the class; None is the one that the config names.

    Raises:
        MismatchError: if it is quantised, of no known class, or its class ties what is stored as two.
        CheckpointError: if the files cannot be read.
    """
    stored = Checkpoint.open(path)
    require_values(stored)
    checkpoint, layout, left_out = library.by_class(stored, like or path, cls)
    specs = dict(checkpoint.specs)
    for name, source in layout.tied.items():
        spec = specs.pop(name, None)
        if spec is not None and source not in specs:
            specs[source] = replace(spec, name=source)
        elif spec is not None and not torch.equal(checkpoint.read(name), checkpoint.read(source)):
            raise MismatchError(
                f"{path}: by config.json {name!r} and {source!r} are one tensor, but two different ones are stored; "
                "set tie_word_embeddings to false there, or save the model again"
            )
    config = {**checkpoint.config, "architectures": [layout.cls]}
    return Model(replace(checkpoint, specs=specs, config=config), layout, left_out)


@dataclass(frozen=True)
class Expert:
    """A full fine-tune: which stored tensor is which base parameter, and which are its head."""

    name: str
    checkpoint: Checkpoint
    stored: Mapping[str, str]
    """Base parameter name -> name in the expert's checkpoint."""
    head: tuple[str, ...]
    """The tensors of its own head, by the names of its class."""
    notes: tuple[str, ...] = ()

    @property
    def is_adapter(self) -> bool:
        """Whether task vectors come as factors."""
        return False

    def trains(self, name: str) -> bool:
        """Whether it brings a value of its own for a base parameter."""
        return name in self.stored

    def task_vector(self, name: str, base: Tensor, bound: float | None = None) -> Tensor:
        """Expert minus base, shaped as `base`; float32, or float64 where either is.

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
        for name in self.head:
            source = self.head_source(name)
            tensors[name] = source.read(name)
            require_finite(tensors[name], f"expert {self.name!r}: {name!r} in {source.specs[name].file}")
        return tensors

    def head_source(self, name: str) -> Checkpoint:
        """Where a tensor of the head is."""
        return self.checkpoint

    def _where(self, stored: str) -> str:
        return f"expert {self.name!r}: {stored!r} in {self.checkpoint.specs[stored].file}"

    @property
    def folder(self) -> Path:
        """A model folder that holds it whole: its own, or what its adapter was merged into."""
        path = self.checkpoint.path
        return path if path.is_dir() else next(iter(self.checkpoint.specs.values())).file.parent

    @property
    def config(self) -> dict[str, Any]:
        """The expert's config.json."""
        return self.checkpoint.config
