"""Says what a merge method is, and finds methods by name: those of this package and those that others bring."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticKnownError, core_schema
from torch import Tensor

from twinmerge.errors import RecipeError
from twinmerge.files.schema import Variant
from twinmerge.merging.statistics import Statistics

ENTRY_POINTS = "twinmerge.merge_methods"
"""Group in which another package names its methods: `name = "package.module"`."""
OWN = {
    "pretrained": "average",
    "average": "average",
    "task_arithmetic": "task_arithmetic",
    "fisher": "fisher",
    "regmean": "regmean",
    "adamerging": "adamerging",
    "slerp": "slerp",
    "nuslerp": "nuslerp",
    "multislerp": "multislerp",
    "karcher": "karcher",
    "model_stock": "model_stock",
    "ties": "ties",
    "dare_linear": "dare",
    "dare_ties": "dare",
    "della": "della",
    "della_linear": "della",
    "breadcrumbs": "breadcrumbs",
    "breadcrumbs_ties": "breadcrumbs",
    "sce": "sce",
    "consensus": "consensus",
    "tall": "consensus",
    "emr": "emr",
    "tsv_m": "tsv",
    "tsv_c": "tsv",
    "iso_c": "iso",
    "iso_cts": "iso",
}
"""This package's methods and their modules, in the order they are shown."""
Knowledge = Literal["A", "B", "C"]
"""What a system is told of a row: A its task's name picks the head, B the head and weights, C nothing."""
Use = Literal["merge", "shared expert", "contestant"]
"""Where a method may stand: in a static merge, under `shared` of a twin, in a suite."""


@dataclass(frozen=True)
class Chunk:
    """The same stretch of one tensor, of every model; its methods give new tensors, which may be changed."""

    tensor: str
    at: int
    """Which entry of the tensor the first one is."""
    base: Tensor | None
    """As stored; None where the merge has no base."""
    experts: Mapping[str, Tensor]
    """Values as stored."""
    changes: Mapping[str, Tensor] = field(default_factory=dict)
    """Task vectors in float32 of the experts that have no values of their own (adapters)."""

    @property
    def names(self) -> list[str]:
        """The experts, sorted: sums in this order have the same bits for any order given."""
        return sorted([*self.experts, *self.changes])

    @property
    def numel(self) -> int:
        """Entries of each model."""
        return next(iter({**self.experts, **self.changes}.values())).numel()

    def base_value(self) -> Tensor:
        """The base in float64."""
        return self._base_float64.clone()

    def value(self, expert: str) -> Tensor:
        """An expert in float64."""
        if expert in self.changes:
            return self.base_value().add_(self.changes[expert])
        return self.experts[expert].to(torch.float64, copy=True)

    def task_vector(self, expert: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Expert - base, subtracted in float64 if either is float64 or `dtype` is (METHOD §2, arXiv:2212.04089)."""
        if expert in self.changes:
            return self.changes[expert].to(dtype, copy=True)
        value = self.experts[expert]
        if torch.float64 in (dtype, value.dtype, self._base.dtype):
            return value.to(torch.float64, copy=True).sub_(self._base_float64).to(dtype)
        return value.to(torch.float32, copy=True).sub_(self._base_float32)

    def total(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The sum of the task vectors, in the order of `names`."""
        found = self.task_vector(self.names[0], dtype)
        for name in self.names[1:]:
            found.add_(self.task_vector(name, dtype))
        return found

    @property
    def _base(self) -> Tensor:
        if self.base is None:
            raise ValueError(f"{self.tensor!r}: this method needs the base")
        return self.base

    @cached_property
    def _base_float64(self) -> Tensor:
        return self._base.double()

    @cached_property
    def _base_float32(self) -> Tensor:
        return self._base.float()


Chunks = Callable[[], Iterator[Chunk]]
"""Goes through one tensor, or a whole model, from its start; may be called again."""


@dataclass(frozen=True)
class Each:
    """Annotates a setting that is one number for all experts or a number for each of them, by name."""

    number: Any
    """The annotated type of the number; its description says what it must be."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate by the form that was given, so that a fault is one fault."""
        number: Any = self.number
        one: TypeAdapter[float] = TypeAdapter(number, config=ConfigDict(strict=True))
        each: TypeAdapter[dict[str, float]] = TypeAdapter(dict[str, number], config=ConfigDict(strict=True))
        return core_schema.no_info_plain_validator_function(
            lambda value: (each if isinstance(value, dict) else one).validate_python(value)
        )


Number = Annotated[float, Field(allow_inf_nan=False, description="a finite number")]
Fraction = Annotated[float, Field(gt=0, le=1, description="the fraction kept, in (0, 1]")]
Scaling = Number | Literal["auto"]
Weight = Annotated[float | dict[str, float], Each(Number)]
"""What an expert is multiplied with."""
Density = Annotated[float | dict[str, float], Each(Fraction)]
"""The fraction of a task vector that is kept."""
Seed = Annotated[int, Field(ge=0, description="same seed, same result, whatever the order of experts")]


class Method(Variant, BaseModel):
    """A merge method and its settings, which are the fields of a subclass: frozen, strict, unknown keys refused.

    A field of this type takes any method: `{"method": "ties", "density": 0.1}` becomes what `find_method` finds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    paper: ClassVar[str]
    protocol: ClassVar[Knowledge] = "A"
    """Of its merged model; under a twin's router every one is C."""
    data: ClassVar[str] = "none"
    """What it must see beside the models."""
    uses: ClassVar[tuple[Use, ...]] = ("merge", "shared expert", "contestant")
    whole: ClassVar[bool] = False
    """Whether it looks at a tensor as a whole and gets it as one chunk in its shape; else in stretches, flattened."""
    uses_base: ClassVar[bool] = True
    """Whether it starts from a base."""
    needs_base: ClassVar[bool] = True
    """Whether one that starts from a base cannot do without."""
    method: str = ""
    """What it is called; the decorator says it."""

    @property
    def automatic(self) -> bool:
        """Whether its scaling is still to be found, for every tensor."""
        return False

    def prepass(self, model: Chunks) -> Any:
        """What must be known of the whole model before its first tensor is merged; read once or more, or never."""
        return None

    def measure(self, tensor: Chunks, statistics: Statistics) -> Any:
        """What must be known of a whole tensor before its first chunk is merged."""
        return None

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """One chunk of the result, in float32 or wider; it is rounded once, by the caller."""
        raise NotImplementedError(f"{type(self).__name__} has no merge")

    def takes_whole(self, tensor: str, shape: tuple[int, ...]) -> bool:
        """Whether it gets this tensor whole; one that is whole for some tensors alone says which."""
        return self.whole

    def memory_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        """What merging a whole tensor takes beside the models: what was measured of it."""
        return 0

    def coefficients(self, experts: Collection[str]) -> Mapping[str, float] | None:
        """Of a linear method: what the task vectors are multiplied with before they are added to the base."""
        return None

    def misfit(self, experts: Collection[str]) -> str | None:
        """What makes the settings unfit for these experts, if anything does."""
        for key in per_expert(type(self)):
            value = getattr(self, key)
            if isinstance(value, dict) and value.keys() != set(experts):
                wrong = min(value.keys() ^ set(experts))
                fault = "is no expert" if wrong in value else "has none"
                known = ", ".join(sorted(experts))
                return f"{key} must be one number, or one for every expert ({known}); {wrong!r} {fault}"
        return None

    @classmethod
    def form_of(cls, data: Any) -> type[Method]:
        """The method that data name.

        Raises:
            PydanticKnownError: if they name none that is known.
        """
        if cls is not Method:
            return cls
        if not isinstance(data, Mapping):
            raise PydanticKnownError("model_attributes_type")
        if "method" not in data:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "'method'"})
        name = data["method"]
        if name not in method_names():
            known = ", ".join(f"'{known}'" for known in method_names())
            tag = {"discriminator": "'method'", "tag": str(name), "expected_tags": known}
            raise PydanticKnownError("union_tag_invalid", tag)
        return find_method(name)


class Weighted(Method):
    """A method that multiplies each expert with a weight."""

    weight: Weight = 1.0

    def weights(self, experts: Collection[str]) -> dict[str, float]:
        """By expert, in the order that sums are taken in."""
        return {expert: of_expert(self.weight, expert) for expert in sorted(experts)}


class Calibrated(Method):
    """A method that needs to know what experts do on inputs: it names a measurement, which jobs/measure.py makes.

    It finds the measured tensors in `statistics`, and never sees a model.
    """

    measurement: ClassVar[str]
    data = "unlabelled inputs of each expert"
    calibration_data: dict[str, str] | None = None
    """JSON lines of inputs by expert; in a twin's recipe, what is left out is its router data."""
    calibration_rows: Annotated[int, Field(ge=1)] = 256
    """Of each expert, at most; all give as many."""

    def misfit(self, experts: Collection[str]) -> str | None:
        """Also data of others than these experts."""
        if fault := super().misfit(experts):
            return fault
        if wrong := sorted((self.calibration_data or dict.fromkeys(experts, "")).keys() ^ set(experts)):
            known = ", ".join(sorted(experts))
            return f"calibration_data must name a file for every expert ({known}) and no other; see {wrong[0]!r}"
        return None


class CalibratedMean(Weighted, Calibrated):
    """A mean of the experts that weighs their numbers by what was measured."""

    def misfit(self, experts: Collection[str]) -> str | None:
        """Also weights that are no shares."""
        if fault := super().misfit(experts):
            return fault
        weights = self.weights(experts)
        if min(weights.values()) < 0 or not any(weights.values()):
            return f"weight must be at least 0, and above it for one expert, found {min(weights.values()):g}"
        return None


class Normalized(Weighted):
    """A method that divides by the weights that took part, if it is asked to."""

    normalize: bool = False

    def misfit(self, experts: Collection[str]) -> str | None:
        """Also weights that are normalised and sum to zero."""
        fault = super().misfit(experts)
        if fault or not self.normalize or abs(sum((weights := self.weights(experts)).values())) >= 1e-8:
            return fault
        given = ", ".join(f"{expert} {weight:g}" for expert, weight in weights.items())
        return f"the weights must not sum to zero when they are normalised, found {given}"


class Scaled(Method):
    """A method that moves the base by a multiple of a direction; a scaling of `auto` is left to be found."""

    data = "none, or labelled validation rows to choose the scaling"
    scaling: Scaling = 1.0

    @property
    def automatic(self) -> bool:
        """Whether the scaling is `auto`."""
        return self.scaling == "auto"

    @property
    def factor(self) -> float:
        """The scaling, which must be a number by now."""
        if self.scaling == "auto":
            raise ValueError(f"{self.method}: scaling 'auto' must be replaced by a number before merging")
        return self.scaling

    def at(self, scaling: float) -> Scaled:
        """The same method with another scaling."""
        return self.model_copy(update={"scaling": scaling})


AnyMethod = TypeVar("AnyMethod", bound=Method)
_registered: dict[str, type[Method]] = {}


def merge_method(name: str, *, paper: str) -> Callable[[type[AnyMethod]], type[AnyMethod]]:
    """Register a class as the merge method of a name, which recipes call it by, ours and mergekit's."""

    def register(cls: type[AnyMethod]) -> type[AnyMethod]:
        here = f"{cls.__module__}.{cls.__qualname__}"
        known = _registered.get(name)
        homes = {f"{known.__module__}.{known.__qualname__}" if known else here, here}
        homes |= {_own_module(name)} if name in OWN and cls.__module__ != _own_module(name) else set()
        if other := homes - {here}:
            raise RecipeError(f"merge method {name!r} is defined twice, in {min(other)} and {here}")
        cls.paper = paper
        cls.model_fields["method"] = FieldInfo(annotation=Literal[name], default=name)  # type: ignore[arg-type]
        cls.model_rebuild(force=True)
        _registered[name] = cls
        return cls

    return register


def method_names() -> tuple[str, ...]:
    """Every name that a recipe may use."""
    return tuple({**OWN, **_registered, **_elsewhere()})


def find_method(name: str) -> type[Method]:
    """The method of a name, imported when it is asked for.

    Raises:
        RecipeError: if there is none, or its package cannot be imported.
    """
    if name in OWN:
        import_module(_own_module(name))
    elif name not in _registered and name in _elsewhere():
        entry = _elsewhere()[name]
        try:
            entry.load()
        except (ImportError, AttributeError) as error:
            raise RecipeError(f"merge method {name!r} of {entry.value} cannot be imported: {error}") from error
        if name not in _registered:
            raise RecipeError(f"{entry.value} is to bring merge method {name!r} and registers none of that name")
    if name not in _registered:
        raise RecipeError(f"merge method {name!r} is not known; known are {', '.join(method_names())}")
    return _registered[name]


def _own_module(name: str) -> str:
    return f"twinmerge.merging.{OWN[name]}"


@cache
def _elsewhere() -> Mapping[str, EntryPoint]:
    return {entry.name: entry for entry in sorted(entry_points(group=ENTRY_POINTS))}


def per_expert(method: type[Method]) -> dict[str, Each]:
    """The settings that may differ by expert, and what each number must be."""
    return {key: each for key, info in method.model_fields.items() for each in info.metadata if isinstance(each, Each)}


def of_expert(setting: float | Mapping[str, float], expert: str) -> float:
    """An expert's number of a setting that may differ by expert."""
    return setting[expert] if isinstance(setting, Mapping) else setting
