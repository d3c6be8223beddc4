"""Knows what a static merge is made of, whether its recipe is ours or mergekit's."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import Field, field_validator

from twinmerge.errors import RecipeError
from twinmerge.files.schema import Strict, load_yaml
from twinmerge.merging.mergekit import RECIPES, AnyRecipe, Dtype, SlerpRecipe, expert_names, rule_for
from twinmerge.merging.methods import SharedParams, Stats, TaskArithmeticParams
from twinmerge.merging.rules import RegistryRule, Rule
from twinmerge.models.source import locate

_IN_STACK = re.compile(r"(?:(.*?)\.)?(\d+)\.")


class MergeRecipe(Strict):
    """A static merge by a method of the registry.

    Attributes:
        base: folder or hub id of the pre-trained model.
        experts: folders or hub ids of the models fine-tuned from it, by name.
        shared: the method and its parameters, as in a twin's recipe.
        dtype: of the result; null keeps the base's, tensor by tensor.
    """

    base: str
    experts: Annotated[dict[str, str], Field(min_length=1)]
    shared: Annotated[SharedParams, Field(discriminator="method")] = TaskArithmeticParams()
    dtype: Dtype | None = None

    @field_validator("shared")
    @classmethod
    def _a_number(cls, shared: SharedParams) -> SharedParams:
        if getattr(shared, "scaling", None) == "auto":
            raise ValueError("scaling: auto is found while a twin is built; a static merge needs a number")
        return shared


@dataclass(frozen=True)
class StaticMerge:
    """A recipe with its models found."""

    recipe: MergeRecipe | AnyRecipe
    reference: Path
    """The model whose names, shapes, config and tokenizer the others must have, and the result gets."""
    base: Path | None
    """The model that task vectors start from; None if the method has none."""
    experts: Mapping[str, Path]
    """The models that are merged, by name."""
    seed: int = 0

    @property
    def method(self) -> str:
        """What the method is called."""
        return self.recipe.shared.method if isinstance(self.recipe, MergeRecipe) else self.recipe.merge_method

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the result; None: each tensor keeps the reference's."""
        name = self.recipe.dtype
        if not isinstance(self.recipe, MergeRecipe):
            name = self.recipe.out_dtype or name
        return getattr(torch, name) if name else None

    @property
    def layers(self) -> int | None:
        """How many layers the recipe says the models have, if it says so."""
        return None if isinstance(self.recipe, MergeRecipe) else self.recipe.layers

    def rule(self, name: str, depth: float, stats: Stats | None) -> Rule:
        """How one tensor is merged; `stats` is what the method's pass over the whole model found."""
        if isinstance(self.recipe, MergeRecipe):
            return RegistryRule(self.recipe.shared, stats)
        return rule_for(self.recipe, name, depth, self.seed)

    def record(self) -> dict[str, Any]:
        """The recipe as it is kept in the manifest."""
        return {
            "method": self.method,
            "base": str(self.base) if self.base else None,
            "experts": {name: str(path) for name, path in self.experts.items()},
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch.") if self.dtype else None,
        }


def load_merge(path: Path, seed: int = 0) -> StaticMerge:
    """Read the recipe of a static merge and find its models.

    Args:
        path: a YAML file, ours or mergekit's (which has `merge_method`).
        seed: of DARE's draws in a mergekit recipe, which has no place for it.

    Raises:
        RecipeError: `file:line`, what is wrong and what to do.
    """
    method = _merge_method(path)
    if method is None:
        recipe = load_yaml(path, MergeRecipe)
        base = locate(path.resolve().parent, recipe.base, "base")
        experts = {n: locate(path.resolve().parent, s, f"experts.{n}") for n, s in recipe.experts.items()}
        return StaticMerge(recipe, base, base, experts, seed)
    if method not in RECIPES:
        raise RecipeError(f"{path}: merge_method {method!r} is not supported; known are {', '.join(RECIPES)}")
    kit: AnyRecipe = load_yaml(path, RECIPES[method])
    try:
        names = expert_names(kit)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    experts = {name: _locate_near(path, name, f"models.{place}.model") for name, place in names.items()}
    start = _locate_near(path, kit.base_model, "base_model") if kit.base_model else None
    if isinstance(kit, SlerpRecipe):
        experts[str(kit.base_model)] = start or path
    averages = kit.merge_method in ("linear", "slerp")
    return StaticMerge(kit, start or next(iter(experts.values())), None if averages else start, experts, seed)


def depths(names: Iterable[str]) -> dict[str, float]:
    """How deep each tensor's layer lies in its stack: 0 the first layer and everything outside stacks, 1 the last.

    A stack is what shares the part of the name before the first number: `model.layers.0.…`, `model.layers.1.…`.

    Example:
        >>> depths(["embed.weight", "layers.0.w", "layers.1.w", "layers.2.w"])["layers.1.w"]
        0.5
    """
    found = {name: (match[1] or "", int(match[2])) for name in names if (match := _IN_STACK.match(name))}
    last: dict[str, int] = defaultdict(int)
    for stack, layer in found.values():
        last[stack] = max(last[stack], layer)
    result = {}
    for name in names:
        stack, layer = found.get(name, ("", 0))
        result[name] = layer / last[stack] if name in found and last[stack] else 0.0
    return result


def layer_count(names: Iterable[str]) -> int:
    """Layers of the largest stack."""
    return max((int(match[2]) + 1 for name in names if (match := _IN_STACK.match(name))), default=0)


def is_twin(path: Path) -> bool:
    """Whether a recipe is a twin's: its experts have router data, or it has keys that no static merge has."""
    data = _content(path)
    experts = data.get("experts")
    entries = list(experts.values()) if isinstance(experts, dict) else []
    return bool({"exclusive", "router", "max_length"} & set(data)) or any(isinstance(e, dict) for e in entries)


def _merge_method(path: Path) -> str | None:
    data = _content(path)
    return str(data["merge_method"]) if "merge_method" in data else None


def _content(path: Path) -> dict[str, Any]:
    """A recipe as it stands there, empty if it cannot be read: `load_yaml` says what is wrong, and where."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def _locate_near(recipe: Path, source: str, key: str) -> Path:
    """A model of a mergekit recipe: from the working directory, as mergekit does, or beside the recipe."""
    here = Path(source).expanduser()
    return here.resolve() if here.exists() else locate(recipe.resolve().parent, source, f"{recipe}: {key}")
