"""Reads the recipe of a static merge, ours or mergekit's, and finds its models."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import Field, model_validator

from twinmerge.errors import RecipeError
from twinmerge.files.schema import Strict, load_yaml
from twinmerge.merging.mergekit import Dtype, KitRecipe, Layers, PerTensor, compile_methods, kit_names, kit_recipe
from twinmerge.merging.method import Method
from twinmerge.merging.slices import IN_STACK, Piece
from twinmerge.merging.task_arithmetic import TaskArithmetic
from twinmerge.merging.tokenizer import TokenizerChoice
from twinmerge.models.provenance import portable
from twinmerge.models.source import locate


class MergeRecipe(Strict):
    """A static merge by a method of ours.

    Attributes:
        base: folder or hub id of the pre-trained model.
        experts: folders or hub ids of the models fine-tuned from it, by name.
        shared: the method and its settings, as in a twin's recipe.
        dtype: of the result; null keeps the base's, tensor by tensor.
    """

    base: str
    experts: Annotated[dict[str, str], Field(min_length=1)]
    shared: Method = TaskArithmetic()
    dtype: Dtype | None = None

    @model_validator(mode="after")
    def _fitting_method(self) -> "MergeRecipe":
        if fault := self.shared.misfit(self.experts):
            raise ValueError(f"shared: {fault}")
        if self.shared.automatic:
            raise ValueError("shared: scaling auto is found while a twin is built; a static merge needs a number")
        return self


@dataclass(frozen=True)
class StaticMerge:
    """A recipe with its models found, and a method for every tensor."""

    method: str
    """What the recipe calls it."""
    methods: PerTensor
    reference: Path
    """The model whose names, shapes, config and tokenizer the others must have, and the result gets."""
    base: Path | None
    """The model that task vectors start from; None if the method has none."""
    experts: Mapping[str, Path]
    """The models that are merged, by name."""
    dtype: torch.dtype | None = None
    """Of the result; None: each tensor keeps the reference's."""
    calibration: Mapping[str, Path] = field(default_factory=dict)
    """Inputs of each expert, for methods that measure on them."""
    pieces: Mapping[str, Sequence[Piece]] = field(default_factory=dict)
    """What each expert is made of, and the base, called nothing, where a recipe has slices."""
    seed: int = 0
    tokenizer: TokenizerChoice = field(default_factory=TokenizerChoice)
    sources: Mapping[Path, str] = field(default_factory=dict)
    """How the manifest calls each of the models: as another machine may read it."""

    def portable(self, text: str) -> str:
        """A text in which models that the recipe names by their absolute paths are called as `sources` does."""
        for name, path in self.experts.items():
            text = text.replace(name, self.sources[path]) if Path(name).is_absolute() else text
        return text

    def record(self) -> dict[str, Any]:
        """The recipe as it is kept in the manifest."""
        calibration = {name: self.sources[path] for name, path in self.calibration.items()}
        return {
            "method": self.method,
            "base": self.sources[self.base] if self.base else None,
            "experts": {self.portable(name): self.sources[path] for name, path in self.experts.items()},
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch.") if self.dtype else None,
        } | ({"calibration_data": calibration} if calibration else {})


Join = Callable[[Path, Path], Path]
"""Gives the folder of a model with an adapter merged into it."""


@dataclass(frozen=True)
class Models:
    """Where a recipe's models are.

    Attributes:
        recipe: its file.
        join: merges an adapter into a model, for `MODEL+ADAPTER`; None knows no adapters.
        merged: those that earlier documents of the file were merged into, by name.
    """

    recipe: Path
    join: Join | None = None
    merged: Mapping[str, Path] = field(default_factory=dict)

    def find(self, source: str, key: str) -> Path:
        """A model of a mergekit recipe: from the working directory, as mergekit does, or beside the recipe."""
        if source in self.merged:
            return self.merged[source]
        here = Path(source).expanduser()
        if here.exists():
            return here.resolve()
        if "+" in source and self.join is not None:
            model, _, adapter = source.partition("+")
            return self.join(self.find(model, key), self.find(adapter, key))
        return locate(self.recipe.resolve().parent, source, f"{self.recipe}: {key}")

    def called(self, source: str, found: Path) -> str:
        """What the manifest calls it: as another machine may read it."""
        if source in self.merged:
            return source
        return "+".join(portable(self.recipe.resolve().parent, part, found) for part in source.split("+"))


def load_merge(
    path: Path,
    seed: int = 0,
    *,
    join: Join | None = None,
    document: int | None = None,
    merged: Mapping[str, Path] = {},
) -> StaticMerge:
    """Read the recipe of a static merge and find its models.

    Args:
        path: a YAML file, ours or mergekit's (which has `merge_method`).
        seed: of DARE's draws in a mergekit recipe, which has no place for it.
        join: see `Models`.
        document: which of several documents, counted from 0; None takes a file of one.
        merged: see `Models`.

    Raises:
        RecipeError: `file:line`, what is wrong and what to do.
    """
    if document is None and (count := len(document_names(path))) > 1:
        raise RecipeError(
            f"{path} holds {count} documents, and this takes one; `twinmerge merge` makes them one after the other"
        )
    name = recipe_content(path, document).get("merge_method")
    if name is None and document is None:
        return _load_ours(path, seed)
    kit = parse_kit(path, document)
    try:
        found = compile_methods(kit, seed)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    models = Models(path, join, merged)
    methods, pieces = found.methods, _pieces(models, found.layers)
    experts = {
        name: pieces[name][0].path if pieces else models.find(name, f"{place}.model")
        for name, place in methods.places.items()
    }
    start = models.find(kit.base_model, "base_model") if kit.base_model else None
    named = {**{piece.model: piece.path for parts in pieces.values() for piece in parts}} or dict(experts)
    named |= {str(kit.base_model): start} if start else {}
    sources = {found: models.called(name, found) for name, found in named.items()}
    base = start if methods.form.uses_base else None
    dtype = _dtype(kit.out_dtype or kit.dtype)
    first = next(iter(experts.values()))
    reference = first if pieces and base is None else start or first
    data = _calibration(path, methods)
    sources |= _called(path, data)
    whose = kit.whose_tokenizer
    theirs = None if whose in ("base", "union") else models.find(whose, "tokenizer")
    tokenizer = TokenizerChoice(theirs, whose == "union", kit.chat_template)
    method = kit.merge_method
    return StaticMerge(method, methods, reference, base, experts, dtype, data, pieces, seed, tokenizer, sources)


def parse_kit(path: Path, document: int | None = None) -> KitRecipe:
    """A document of mergekit's, checked but for its models.

    Raises:
        RecipeError: `file:line`, what is wrong.
    """
    name = recipe_content(path, document).get("merge_method")
    if name is None:
        raise RecipeError(f"{path}: document {(document or 0) + 1} must have merge_method, which of several each has")
    if name not in kit_names():
        raise RecipeError(f"{path}: merge_method {name!r} is not supported; known are {', '.join(kit_names())}")
    return load_yaml(path, kit_recipe(name), document)


def _pieces(models: Models, layers: Mapping[str, Sequence[Layers]]) -> dict[str, tuple[Piece, ...]]:
    """The layers of slices, with their models found."""
    return {
        name: tuple(
            Piece(one.model, models.find(one.model, f"{one.place}.model"), one.start, one.stop) for one in parts
        )
        for name, parts in layers.items()
    }


def _load_ours(path: Path, seed: int) -> StaticMerge:
    if keys := twin_keys(path):
        raise RecipeError(
            f"{path} is the recipe of a twin (it has {keys[0]}); `twinmerge build` takes it. A static merge has base, "
            "experts (a folder for each name), shared and dtype"
        )
    recipe = load_yaml(path, MergeRecipe)
    root = path.resolve().parent
    base = locate(root, recipe.base, "base")
    experts = {name: locate(root, source, f"experts.{name}") for name, source in recipe.experts.items()}
    named = [(recipe.base, base), *((recipe.experts[name], found) for name, found in experts.items())]
    sources = {found: portable(root, source, found) for source, found in named}
    methods = PerTensor(type(recipe.shared), recipe.shared.model_dump())
    data, dtype = _calibration(path, methods), _dtype(recipe.dtype)
    sources |= _called(path, data)
    return StaticMerge(recipe.shared.method, methods, base, base, experts, dtype, data, {}, seed, sources=sources)


def _calibration(path: Path, methods: PerTensor) -> dict[str, Path]:
    """Inputs of each expert, where the method asks for them."""
    data = methods.common.get("calibration_data") or methods.defaults.get("calibration_data") or {}
    return {n: locate(path.resolve().parent, s, f"calibration_data.{n}") for n, s in data.items()}


def _called(path: Path, files: Mapping[str, Path]) -> dict[Path, str]:
    return {file: portable(path.resolve().parent, file) for file in files.values()}


def _dtype(name: str | None) -> torch.dtype | None:
    return getattr(torch, name) if name else None


def depths(names: Iterable[str]) -> dict[str, float]:
    """How deep each tensor's layer lies in its stack: 0 the first layer and everything outside stacks, 1 the last.

    A stack is what shares the part of the name before the first number: `model.layers.0.…`, `model.layers.1.…`.

    Example:
        >>> depths(["embed.weight", "layers.0.w", "layers.1.w", "layers.2.w"])["layers.1.w"]
        0.5
    """
    found = {name: (match[1] or "", int(match[2])) for name in names if (match := IN_STACK.match(name))}
    last: dict[str, int] = defaultdict(int)
    for stack, layer in found.values():
        last[stack] = max(last[stack], layer)
    result = {}
    for name in names:
        stack, layer = found.get(name, ("", 0))
        result[name] = layer / last[stack] if name in found and last[stack] else 0.0
    return result


def twin_keys(path: Path) -> list[str]:
    """What makes a recipe a twin's: keys that no static merge has, experts with router data; empty if nothing does."""
    data = recipe_content(path)
    experts = data.get("experts")
    entries = experts if isinstance(experts, dict) else {}
    return [key for key in ("exclusive", "router", "max_length") if key in data] + [
        f"experts.{name} with {', '.join(map(str, entry))}"
        for name, entry in entries.items()
        if isinstance(entry, dict)
    ]


def document_names(path: Path) -> list[str | None]:
    """The names of a file's documents, None for one without; none if it cannot be read."""
    try:
        found = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return []
    return [str(one["name"]) if isinstance(one, dict) and one.get("name") else None for one in found]


def recipe_content(path: Path, document: int | None = None) -> dict[str, Any]:
    """A recipe as it stands there, empty if it cannot be read: `load_yaml` says what is wrong, and where."""
    try:
        text, loader = path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        data = yaml.load(text, loader) if document is None else list(yaml.load_all(text, loader))[document]
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}
