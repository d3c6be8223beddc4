"""Knows mergekit's YAML: which of its keys are understood, and what they say about one tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from twinmerge.errors import RecipeError
from twinmerge.files.schema import Strict
from twinmerge.merging.rules import AverageRule, DareRule, Rule, SlerpRule, TaskArithmeticRule, TiesRule
from twinmerge.merging.weighted import total_weight

Dtype = Literal["float32", "float16", "bfloat16"]
_UNSUPPORTED = ("tokenizer", "chat_template", "modules", "parallel", "embed_slerp")


@dataclass(frozen=True)
class Setting:
    """A number that may depend on the tensor's name and on how deep its layer lies."""

    entries: tuple[tuple[str | None, tuple[float, ...]], ...]
    """Part of a name that an entry is for (None: every name), and its values from the first layer to the last."""

    def at(self, name: str, depth: float) -> float | None:
        """The value for a tensor, between the listed ones in a straight line; None if no filter fits its name.

        Args:
            name: of the tensor.
            depth: 0 in the first layer and outside the layers, 1 in the last layer.
        """
        for part, values in self.entries:
            if part is None or part in name:
                place = depth * (len(values) - 1)
                below = min(int(place), len(values) - 1)
                above = min(below + 1, len(values) - 1)
                return values[below] + (place - below) * (values[above] - values[below])
        return None


def _parse_setting(value: Any, *, low: float, high: float, kind: str) -> Any:
    filtered = isinstance(value, list) and any(isinstance(entry, dict) for entry in value)
    entries = []
    for entry in value if filtered else [{"value": value}]:
        if not isinstance(entry, dict) or "value" not in entry or set(entry) - {"filter", "value"}:
            raise ValueError(f"an entry of the list takes filter and value, found {entry!r}")
        numbers = entry["value"] if isinstance(entry["value"], list) else [entry["value"]]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float) or not low <= number <= high:
                raise ValueError(f"must be {kind}, found {number!r}")
        if not numbers:
            raise ValueError("an empty list has no value")
        part = entry.get("filter")
        entries.append((None if part in (None, "*") else str(part), tuple(float(number) for number in numbers)))
    return Setting(tuple(entries))


_finite = partial(_parse_setting, low=-1e30, high=1e30, kind="a finite number")
Weight = Annotated[Setting, BeforeValidator(_finite)]
Density = Annotated[
    Setting, BeforeValidator(partial(_parse_setting, low=1e-12, high=1.0, kind="the fraction kept, in (0, 1]"))
]
Position = Annotated[Setting, BeforeValidator(partial(_parse_setting, low=0.0, high=1.0, kind="in [0, 1]"))]
Scaling = Annotated[float, Field(allow_inf_nan=False)]


class _Model(Strict):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Weighted(_Model):
    """What `linear` and `task_arithmetic` take for one model."""

    weight: Weight | None = None


class WeightedSparse(Weighted):
    """What TIES and DARE take for one model."""

    density: Density | None = None


class LinearParameters(Weighted):
    """Of `linear`, for all models."""

    normalize: bool = True


class TaskArithmeticParameters(Weighted):
    """Of `task_arithmetic`, for all models; `int8_mask` saves memory in mergekit and changes nothing here."""

    normalize: bool = False
    int8_mask: bool = False
    scaling: Scaling = Field(default=1.0, alias="lambda")


class TiesParameters(WeightedSparse):
    """Of `ties`, for all models."""

    normalize: bool = True
    int8_mask: bool = False
    scaling: Scaling = Field(default=1.0, alias="lambda")


class DareParameters(WeightedSparse):
    """Of `dare_linear` and `dare_ties`, for all models."""

    normalize: bool = False
    int8_mask: bool = False
    rescale: bool = True
    scaling: Scaling = Field(default=1.0, alias="lambda")


class SlerpParameters(_Model):
    """Of `slerp`."""

    t: Position | None = None


class _Recipe(_Model):
    """What all methods share."""

    merge_method: str
    base_model: str | None = None
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: str | None = None
    name: str | None = None
    layers: int | None = Field(default=None, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _whole_models(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Write a single slice over all layers as the list of models it is."""
        for key in _UNSUPPORTED:
            if key in data:
                raise ValueError(f"mergekit's key {key!r} is not supported; remove it or use mergekit for this recipe")
        if "slices" not in data:
            return data
        slices = data["slices"]
        if not isinstance(slices, list) or len(slices) != 1 or "models" in data:
            raise ValueError("slices are supported only as one slice over all layers of the models")
        [part] = slices
        sources = part.get("sources") if isinstance(part, dict) else None
        if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
            raise ValueError("a slice needs its sources, each a model with its layer_range")
        ranges = {tuple(source.get("layer_range") or ()) for source in sources}
        if len(ranges) != 1 or len(whole := ranges.pop()) != 2 or whole[0] != 0:
            raise ValueError(
                "slices are supported only over all layers: the same layer_range [0, LAYERS] in each source"
            )
        models = [{key: value for key, value in source.items() if key != "layer_range"} for source in sources]
        rest = {key: value for key, value in data.items() if key != "slices"}
        if unknown := set(part) - {"sources"}:
            raise ValueError(f"a slice takes sources alone here, found {', '.join(sorted(unknown))}")
        return {**rest, "models": models, "layers": whole[1]}

    @field_validator("tokenizer_source")
    @classmethod
    def _base_tokenizer(cls, source: str | None) -> str | None:
        if source not in (None, "base"):
            raise ValueError(f"only 'base' is supported, found {source!r}")
        return source


class _Source(_Model):
    model: str

    @field_validator("model")
    @classmethod
    def _full_model(cls, model: str) -> str:
        if "+" in model and not Path(model).expanduser().exists():
            raise ValueError(f"a model with a LoRA added, {model!r}, is not supported; merge the adapter into it first")
        return model


class WeightedSource(_Source):
    """A model of `linear` or `task_arithmetic`."""

    parameters: Weighted = Weighted()


class SparseSource(_Source):
    """A model of TIES or DARE."""

    parameters: WeightedSparse = WeightedSparse()


class SlerpSource(_Source):
    """A model of `slerp`."""


class LinearRecipe(_Recipe):
    """`merge_method: linear`."""

    merge_method: Literal["linear"]
    models: list[WeightedSource]
    parameters: LinearParameters = LinearParameters()


class TaskArithmeticRecipe(_Recipe):
    """`merge_method: task_arithmetic`."""

    merge_method: Literal["task_arithmetic"]
    models: list[WeightedSource]
    parameters: TaskArithmeticParameters = TaskArithmeticParameters()


class TiesRecipe(_Recipe):
    """`merge_method: ties`."""

    merge_method: Literal["ties"]
    models: list[SparseSource]
    parameters: TiesParameters = TiesParameters()


class DareRecipe(_Recipe):
    """`merge_method: dare_linear` or `dare_ties`."""

    merge_method: Literal["dare_linear", "dare_ties"]
    models: list[SparseSource]
    parameters: DareParameters = DareParameters()


class SlerpRecipe(_Recipe):
    """`merge_method: slerp`."""

    merge_method: Literal["slerp"]
    models: list[SlerpSource]
    parameters: SlerpParameters


AnyRecipe = LinearRecipe | TaskArithmeticRecipe | TiesRecipe | DareRecipe | SlerpRecipe
RECIPES: Mapping[str, type[AnyRecipe]] = {
    "linear": LinearRecipe,
    "task_arithmetic": TaskArithmeticRecipe,
    "ties": TiesRecipe,
    "dare_linear": DareRecipe,
    "dare_ties": DareRecipe,
    "slerp": SlerpRecipe,
}


def expert_names(recipe: AnyRecipe) -> dict[str, int]:
    """The models that are merged into the base, by what the recipe calls them, and their places in its list.

    Raises:
        RecipeError: if there are none, one stands twice, or the method needs another number of them.
    """
    names: dict[str, int] = {}
    for place, source in enumerate(recipe.models):
        if source.model == recipe.base_model and recipe.merge_method != "linear":
            continue
        if source.model in names:
            raise RecipeError(f"models.{place}: {source.model!r} stands twice in the list")
        names[source.model] = place
    if recipe.merge_method != "linear" and recipe.base_model is None:
        raise RecipeError(f"{recipe.merge_method} needs a base_model")
    if isinstance(recipe, SlerpRecipe) and len(names) != 1:
        raise RecipeError(f"slerp goes from base_model to one other model, found {len(names)} others")
    if not names:
        raise RecipeError("models: none is left to merge besides the base_model")
    return names


def rule_for(recipe: AnyRecipe, name: str, depth: float, seed: int) -> Rule:
    """How the recipe merges one tensor.

    Args:
        recipe: the parsed YAML.
        name: of the tensor.
        depth: of its layer, 0 to 1; see `Setting.at`.
        seed: of DARE's draws.

    Raises:
        RecipeError: if a needed parameter has no value for this tensor, or weights cannot be normalised.
    """
    experts = expert_names(recipe)
    shared = recipe.parameters
    if isinstance(recipe, SlerpRecipe) or isinstance(shared, SlerpParameters):
        [other] = experts
        return SlerpRule(str(recipe.base_model), other, _value(recipe, "t", None, name, depth, None))
    weights = {expert: _value(recipe, "weight", place, name, depth, None) for expert, place in experts.items()}
    if shared.normalize:
        total_weight(weights)
    if isinstance(shared, LinearParameters):
        return AverageRule(weights, shared.normalize)
    if isinstance(shared, TaskArithmeticParameters):
        return TaskArithmeticRule(weights, shared.normalize, shared.scaling)
    densities = {expert: _value(recipe, "density", place, name, depth, 1.0) for expert, place in experts.items()}
    if isinstance(shared, TiesParameters):
        return TiesRule(weights, densities, shared.normalize, shared.scaling)
    elect = recipe.merge_method == "dare_ties"
    return DareRule(weights, densities, shared.normalize, shared.scaling, shared.rescale, elect, seed)


def _value(recipe: AnyRecipe, key: str, place: int | None, name: str, depth: float, default: float | None) -> float:
    """The model's own value, else the one for all models, else the default."""
    own = None if place is None else getattr(recipe.models[place], "parameters", None)
    for parameters in (own, recipe.parameters):
        setting = getattr(parameters, key, None)
        value = setting.at(name, depth) if setting else None
        if value is not None:
            return float(value)
    if default is None:
        whose = "" if place is None else f"models.{place}.parameters or "
        raise RecipeError(f"{whose}parameters must give {key!r} for tensor {name!r}, found none")
    return default
