"""Reads mergekit's YAML: which of its keys are understood, and the method it asks for on each tensor."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from functools import partial
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from twinmerge.errors import RecipeError
from twinmerge.files.schema import Strict, members
from twinmerge.merging.method import OWN, Method, find_method, method_names, per_expert
from twinmerge.merging.slices import comes_first, layer_of

Dtype = Literal["float32", "float16", "bfloat16"]
_UNSUPPORTED = ("modules", "parallel", "embed_slerp")


@dataclass(frozen=True)
class _Theirs:
    """What a method of mergekit's is here, where the two differ."""

    name: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ("weight",)
    only: Mapping[str, Any] = field(default_factory=dict)
    """Parameters that may say nothing else than this."""
    called: Mapping[str, str] = field(default_factory=lambda: {"scaling": "lambda"})
    """Settings that mergekit calls otherwise; those called nothing it does not have."""


_THEIRS: Mapping[str, _Theirs] = {
    "linear": _Theirs("average"),
    "task_arithmetic": _Theirs("task_arithmetic", {"scaling": 1.0}, only={"rescale": False}),
    "ties": _Theirs("ties", {"scaling": 1.0, "density": 1.0, "scope": "tensor"}, only={"rescale": False}),
    "dare_linear": _Theirs("dare_linear", {"scaling": 1.0, "density": 1.0}),
    "dare_ties": _Theirs("dare_ties", {"scaling": 1.0, "density": 1.0, "normalize": False}),
    "passthrough": _Theirs(
        "average", {"normalize": False, "weight": 1.0}, required=(), called={"weight": "scale", "normalize": ""}
    ),
    "slerp": _Theirs("slerp", required=("t",)),
    "nuslerp": _Theirs("nuslerp", only={"nuslerp_flatten": True, "nuslerp_row_wise": False}),
    "multislerp": _Theirs("multislerp"),
    "karcher": _Theirs("karcher", required=()),
    "model_stock": _Theirs("model_stock", required=(), only={"filter_wise": False}),
    "della": _Theirs("della", {"density": 1.0}),
    "della_linear": _Theirs("della_linear", {"scaling": 1.0, "density": 1.0}),
    "breadcrumbs": _Theirs("breadcrumbs", {"scaling": 1.0, "density": 1.0}, only={"rescale": False}),
    "breadcrumbs_ties": _Theirs("breadcrumbs_ties", {"scaling": 1.0, "density": 1.0}, only={"rescale": False}),
    "sce": _Theirs("sce", required=()),
}
_NOT_THEIRS = ("method", "scope", "seed")
"""Settings that mergekit would ignore."""


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


def _parse_setting(value: Any, *, check: Callable[[Any], Any], kind: str | None) -> Setting:
    filtered = isinstance(value, list) and any(isinstance(entry, dict) for entry in value)
    entries = []
    for entry in value if filtered else [{"value": value}]:
        if not isinstance(entry, dict) or "value" not in entry or set(entry) - {"filter", "value"}:
            raise ValueError(f"an entry of the list takes filter and value, found {entry!r}")
        numbers = entry["value"] if isinstance(entry["value"], list) else [entry["value"]]
        for found in numbers:
            if isinstance(found, bool) or not isinstance(found, int | float):
                raise ValueError(f"must be {kind or 'a number'}, found {found!r}")
            try:
                check(found)
            except ValidationError as error:
                words = f"must be {kind}" if kind else error.errors()[0]["msg"].lower()
                raise ValueError(f"{words}, found {found!r}") from error
        if not numbers:
            raise ValueError("an empty list has no value")
        part = entry.get("filter")
        entries.append((None if part in (None, "*") else str(part), tuple(float(found) for found in numbers)))
    return Setting(tuple(entries))


class _Model(Strict):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


class KitTokenizer(_Model):
    """Whose tokenizer the result gets: `base`, `union`, or a model."""

    source: str = "union"
    tokens: Literal[None] = None
    pad_to_multiple_of: Literal[None] = None


class KitRecipe(_Model):
    """What all methods share."""

    merge_method: str
    base_model: str | None = None
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: str | None = None
    tokenizer: KitTokenizer | None = None
    chat_template: str | None = None
    name: str | None = None
    models: list[Any] = []
    slices: list[Any] = []
    parameters: Any = None

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: dict[str, Any]) -> dict[str, Any]:
        for key in _UNSUPPORTED:
            if key in data:
                raise ValueError(f"mergekit's key {key!r} is not supported; remove it or use mergekit for this recipe")
        if ("models" in data) == ("slices" in data):
            raise ValueError("a recipe has either models or slices")
        return data

    @field_validator("chat_template")
    @classmethod
    def _template_itself(cls, template: str | None) -> str | None:
        if template is not None and template != "auto" and not any(mark in template for mark in ("{{", "{%")):
            raise ValueError(f"must be auto or a Jinja template itself, found {template!r}")
        return template

    @model_validator(mode="after")
    def _one_tokenizer(self) -> "KitRecipe":
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("a recipe has either tokenizer or tokenizer_source")
        return self

    @property
    def whose_tokenizer(self) -> str:
        """`base`, `union` or a model."""
        return self.tokenizer.source if self.tokenizer else self.tokenizer_source or "base"


_Range = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]
"""First layer, and the one after the last."""


class _Source(_Model):
    model: str


def kit_names() -> list[str]:
    """Every `merge_method` that is understood: mergekit's, then those of other packages."""
    return [*_THEIRS, *(name for name in method_names() if name not in OWN)]


def form_of(name: str) -> type[Method]:
    """The method that a `merge_method` stands for.

    Raises:
        RecipeError: if it is not known.
    """
    return find_method(_THEIRS[name].name if name in _THEIRS else name)


def kit_recipe(name: str) -> type[KitRecipe]:
    """The model of a recipe with this `merge_method`: its parameters are the method's settings.

    Raises:
        RecipeError: if the method is not known.
    """
    theirs, form = _THEIRS.get(name), form_of(name)
    called: Mapping[str, str] = theirs.called if theirs else {}
    common: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key, info in form.model_fields.items():
        if key == "method" or (theirs and key in _NOT_THEIRS) or called.get(key) == "":
            continue
        alias = called.get(key)
        each = per_expert(form).get(key)
        plain: Any = info.rebuild_annotation()
        if each is None and float not in members(info.annotation):
            common[key] = (plain, None)
            continue
        kind = get_args(each.number)[1].description if each else info.description
        parse = partial(_parse_setting, check=TypeAdapter(each.number if each else plain).validate_python, kind=kind)
        common[key] = (Annotated[Setting | None, BeforeValidator(parse)], Field(default=None, alias=alias))
        own |= {key: common[key]} if each else {}
    if theirs and {"scaling", "select_topk"} & common.keys():
        common["int8_mask"] = (bool, False)  # saves memory in mergekit and changes nothing here
    common |= {key: (Literal[value], value) for key, value in (theirs.only if theirs else {}).items()}
    parameters = create_model("Parameters", __base__=_Model, **common)
    own_parameters = create_model("Own", __base__=_Model, **own)
    source = create_model("Source", __base__=_Source, parameters=(own_parameters, own_parameters()))
    piece: Any = create_model("Piece", __base__=source, layer_range=(_Range, ...))
    part: Any = create_model(
        "Slice", __base__=_Model, sources=(list[piece], ...), parameters=(parameters, parameters())
    )
    fields: dict[str, Any] = {
        "models": (list[source], []),  # type: ignore[valid-type]
        "slices": (list[part], []),
        "parameters": (parameters, parameters()),
    }
    return create_model("Recipe", __base__=KitRecipe, **fields)


@dataclass(frozen=True)
class PerTensor:
    """A method for every tensor, which differ where settings depend on the tensor's name or depth; picklable."""

    form: type[Method]
    defaults: Mapping[str, Any]
    """What a setting is where nothing else is said."""
    common: Mapping[str, Any] = field(default_factory=dict)
    """Of all experts: values and `Setting`s."""
    own: Mapping[str, Mapping[str, Setting]] = field(default_factory=dict)
    """By expert."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Where the recipe lists each expert, for messages."""
    required: tuple[str, ...] = ()
    """Settings that must be said for every tensor."""

    def at(self, tensor: str, depth: float) -> Method:
        """The method that merges one tensor.

        Args:
            tensor: its name.
            depth: of its layer, 0 to 1; see `Setting.at`.

        Raises:
            RecipeError: if a setting that is needed has no value for this tensor, or one has a wrong value.
        """
        values = {}
        for key in self.form.model_fields:
            found = {expert: _resolve(own.get(key), tensor, depth) for expert, own in self.own.items()}
            rest = _resolve(self.common.get(key), tensor, depth)
            rest = self.defaults.get(key) if rest is None else rest
            missing = [expert for expert, value in found.items() if value is None]
            if rest is None and key in self.required and (missing or not found):
                whose = f"{self.places[missing[0]]}.parameters or " if key in per_expert(self.form) else ""
                raise RecipeError(f"{whose}parameters must give {key!r} for tensor {tensor!r}, found none")
            if len(missing) < len(found):
                values[key] = {expert: rest if value is None else value for expert, value in found.items()}
            elif rest is not None:
                values[key] = rest
        try:
            return self.form.model_validate(values)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(part) for part in ("parameters", *fault["loc"]))
            raise RecipeError(f"{where}: {fault['msg']}, found {fault['input']!r}, for tensor {tensor!r}") from error


def _resolve(setting: Any, tensor: str, depth: float) -> Any:
    return setting.at(tensor, depth) if isinstance(setting, Setting) else setting


@dataclass(frozen=True)
class PerSlice(PerTensor):
    """The same, where slices differ too; the fields are the first slice's."""

    slices: tuple[tuple[int, PerTensor], ...] = ()
    """How many layers of the result each slice gives, and its methods."""

    def at(self, tensor: str, depth: float) -> Method:
        """The method of the slice that a tensor lies in; lists of values go from its first layer to its last."""
        layer = layer_of(tensor)
        if layer is None:
            return self.slices[0 if comes_first(tensor) else -1][1].at(tensor, 0.0)
        for count, methods in self.slices:
            if layer < count:
                return methods.at(tensor, layer / (count - 1) if count > 1 else 0.0)
            layer -= count
        raise ValueError(f"{tensor!r} lies beyond the last slice")


@dataclass(frozen=True)
class Layers:
    """Where a source of a slice takes its layers from."""

    model: str
    place: str
    """Of the source in the recipe, for messages."""
    start: int
    stop: int


@dataclass(frozen=True)
class KitMerge:
    """A recipe's methods and models."""

    methods: PerTensor
    layers: Mapping[str, Sequence[Layers]] = field(default_factory=dict)
    """Of a recipe of slices: what each expert is made of, and the base, which is called nothing."""


def compile_methods(recipe: KitRecipe, seed: int) -> KitMerge:
    """The recipe's method for every tensor, and what its models are made of.

    Args:
        recipe: the parsed YAML.
        seed: of random draws, for which mergekit's recipes have no place.

    Raises:
        RecipeError: if there are no models, one stands twice, slices do not fit each other, or the method needs a base
            and has none.
    """
    theirs = _THEIRS.get(recipe.merge_method, _Theirs(recipe.merge_method, required=()))
    form = form_of(recipe.merge_method)
    required = (*theirs.required, *(key for key, info in form.model_fields.items() if info.is_required()))
    fields = {key: info for key, info in form.model_fields.items() if key not in required}
    defaults = {key: info.get_default(call_default_factory=True) for key, info in fields.items()}
    defaults |= {"seed": seed} if "seed" in defaults else {}
    parts = [(f"slices.{i}.sources", part.sources, _given(part.parameters)) for i, part in enumerate(recipe.slices)]
    parts = parts or [("models", recipe.models, {})]
    found = [_experts(recipe, form, sources, where) for where, sources, _ in parts]
    alike = all(list(places) == list(found[0]) for places in found)
    layers: dict[str, list[Layers]] = {}
    of_slices = []
    for (where, sources, given), places in zip(parts, found, strict=True):
        if len(places) != len(found[0]):
            wanted = len(found[0])
            raise RecipeError(f"{where} must be as many as those of the first slice, {wanted}, found {len(places)}")
        called = {model if alike else f"source {i}": place for i, (model, place) in enumerate(places.items())}
        common = {**_given(recipe.parameters), **given}
        own = {name: _given(sources[place].parameters) for name, place in called.items()}
        named = {name: f"{where}.{place}" for name, place in called.items()}
        of_slices.append(PerTensor(form, {**defaults, **theirs.defaults}, common, own, named, required))
        if recipe.slices:
            for name, one in _layers(recipe, form, sources, where, called).items():
                layers.setdefault(name, []).append(one)
    if len(of_slices) == 1:
        return KitMerge(of_slices[0], layers)
    counts = [one.stop - one.start for one in next(iter(layers.values()))]
    first = {key.name: getattr(of_slices[0], key.name) for key in dataclass_fields(PerTensor)}
    return KitMerge(PerSlice(**first, slices=tuple(zip(counts, of_slices, strict=True))), layers)


def _given(parameters: BaseModel) -> dict[str, Any]:
    return {key: getattr(parameters, key) for key in parameters.model_fields_set}


def _layers(
    recipe: KitRecipe, form: type[Method], sources: Sequence[Any], where: str, called: Mapping[str, int]
) -> dict[str, Layers]:
    """What a slice takes from each of its sources, the base among them."""
    found = dict(called)
    if form.uses_base and recipe.base_model is not None:
        places = [place for place, source in enumerate(sources) if source.model == recipe.base_model]
        if len(places) != 1:
            raise RecipeError(f"{where} must list the base_model once, found it {len(places)} times")
        found[""] = places[0]
    ranges = {place: sources[place].layer_range for place in found.values()}
    for place, (start, stop) in ranges.items():
        count = stop - start
        if count < 1 or count != ranges[min(ranges)][1] - ranges[min(ranges)][0]:
            raise RecipeError(
                f"{where}.{place}.layer_range must be [FIRST, END] with as many layers in each source of the slice, "
                f"found [{start}, {stop}]"
            )
    return {name: Layers(sources[p].model, f"{where}.{p}", *ranges[p]) for name, p in found.items()}


def _experts(recipe: KitRecipe, form: type[Method], sources: Sequence[Any], where: str) -> dict[str, int]:
    """The models that are merged into the base, by what the recipe calls them, and their places in a list of it."""
    names: dict[str, int] = {}
    for place, source in enumerate(sources):
        if source.model == recipe.base_model and form.uses_base:
            continue
        if source.model in names:
            raise RecipeError(f"{where}.{place}: {source.model!r} stands twice in the list")
        names[source.model] = place
    counted = recipe.merge_method != "passthrough" and not form.uses_base
    if counted and recipe.base_model is not None and recipe.base_model not in names:
        raise RecipeError(
            f"mergekit counts the base_model of {recipe.merge_method} as one of the models; list it under {where}, or "
            "leave base_model out"
        )
    if form.uses_base and form.needs_base and recipe.base_model is None:
        raise RecipeError(f"{recipe.merge_method} needs a base_model")
    if not names:
        raise RecipeError(f"{where}: none is left to merge besides the base_model")
    if recipe.merge_method == "passthrough" and len(names) > 1:
        raise RecipeError(f"{where}: passthrough takes one model, found {len(names)}")
    return names
