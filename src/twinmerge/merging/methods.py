"""The merge methods by name, and the parameters of each: the only registry.

A method is a function on one tensor. To add one, write its parameters, its function and one entry
of `METHODS`; nothing else in the project knows a method's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float, Float32
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from twinmerge.errors import MismatchError
from twinmerge.merging.linear import task_arithmetic, weight_average
from twinmerge.merging.sparsify import dare
from twinmerge.merging.ties import Stream, disjoint_mean, model_thresholds, tensor_thresholds, ties

Density = Annotated[float, Field(gt=0, le=1, description="fraction of the task vector kept, (0, 1]")]
Scaling = Annotated[float, Field(allow_inf_nan=False)] | Literal["auto"]
Seed = Annotated[int, Field(ge=0, description="same seed, same result, whatever the order of experts")]

Stats = Mapping[str, float]
"""What a prepass over the whole model learned, one number by expert."""


class MergeParams(BaseModel):
    """Parameters of one merge method; `method` says which."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    method: str


class PretrainedParams(MergeParams):
    """The base itself, no expert in it."""

    method: Literal["pretrained"] = "pretrained"


class AverageParams(MergeParams):
    """The mean of the experts."""

    method: Literal["average"] = "average"


class TaskArithmeticParams(MergeParams):
    """base + scaling * sum of task vectors."""

    method: Literal["task_arithmetic"] = "task_arithmetic"
    scaling: Scaling = 0.3


class TiesParams(MergeParams):
    """Trim, elect sign, disjoint mean; `scope` says what density is a fraction of."""

    method: Literal["ties"] = "ties"
    density: Density = 0.2
    scaling: Scaling = 1.0
    scope: Literal["model", "tensor"] = "model"


class DareLinearParams(MergeParams):
    """Drop and rescale, then task arithmetic."""

    method: Literal["dare_linear"] = "dare_linear"
    density: Density = 0.2
    scaling: Scaling = 0.3
    seed: Seed = 0


class DareTiesParams(MergeParams):
    """Drop and rescale in the place of trimming, then elect sign and disjoint mean."""

    method: Literal["dare_ties"] = "dare_ties"
    density: Density = 0.2
    scaling: Scaling = 1.0
    seed: Seed = 0


SharedParams = Annotated[
    PretrainedParams | AverageParams | TaskArithmeticParams | TiesParams | DareLinearParams | DareTiesParams,
    Field(discriminator="method"),
]


@runtime_checkable
class MergeFunction(Protocol):
    """The form of a method."""

    def __call__(
        self, base: Tensor, task_vectors: Mapping[str, Tensor], *, params: Any, name: str, stats: Stats | None = None
    ) -> Tensor:
        """Merge one tensor: base of any float dtype, task vectors in float32, result in float32.

        A method that draws at random also takes `at`, see `merge_tensor`.
        """
        ...


@dataclass(frozen=True)
class MergeMethod:
    """A merge method: what it is called, what it does, what it needs and where it comes from."""

    name: str
    function: MergeFunction
    params: type[MergeParams]
    paper: str
    prepass: Callable[[Any, Stream], Stats | None] | None = None
    """Reads the whole model before the first tensor is merged."""
    tensor_prepass: Callable[[Any, Stream], Stats | None] | None = None
    """Reads one whole tensor before its first stretch is merged; what it returns takes the place of the stats."""
    streams: bool = False
    """Whether an entry of the result depends on the same entry of the inputs alone, apart from the stats."""
    draws: bool = False
    """Whether an entry of the result depends on where it is in its tensor."""
    coefficient: Callable[[Any, int], float] | None = None
    """Of a linear method, from its parameters and the number of experts."""

    @property
    def linear(self) -> bool:
        """Whether shared = base + coefficient * sum of task vectors."""
        return self.coefficient is not None


def merge_tensor(
    params: MergeParams,
    base: Float[Tensor, "..."],
    task_vectors: Mapping[str, Float32[Tensor, "..."]],
    *,
    name: str,
    stats: Stats | None = None,
    at: int = 0,
) -> Float32[Tensor, "..."]:
    """Merge one tensor as `params` say.

    Args:
        params: of the method; a scaling of "auto" must have been replaced by a number.
        base: a parameter of the base model, any float dtype.
        task_vectors: expert - base in float32, by expert; their order does not matter.
        name: of the parameter; seeds random draws.
        stats: what `run_prepass` or `run_tensor_prepass` returned.
        at: which entry of the flattened parameter the first one is, if this is a stretch of it.

    Returns:
        The parameter of the shared expert in float32.

    Raises:
        MismatchError: if a task vector has another shape than the base.
        ValueError: if there is no task vector, the scaling is "auto" or a needed `stats` is missing.
    """
    if not task_vectors:
        raise ValueError(f"{name!r} has no task vector to merge")
    for expert, vector in task_vectors.items():
        if vector.shape != base.shape:
            raise MismatchError(
                f"expert {expert!r}, {name!r}: task vector of shape {tuple(vector.shape)}, base {tuple(base.shape)}"
            )
    method = METHODS[params.method]
    place = {"at": at} if method.draws else {}
    return method.function(base, task_vectors, params=params, name=name, stats=stats, **place)


def run_prepass(params: MergeParams, stream: Stream) -> Stats | None:
    """Read the whole model once or twice if the method needs to, before any tensor is merged.

    Args:
        params: of the method.
        stream: gives (name, task vectors by expert) for every tensor that will be merged; each
            call starts from the beginning.

    Returns:
        What to hand to `merge_tensor` as `stats`; None if the method needs nothing.
    """
    prepass = METHODS[params.method].prepass
    return prepass(params, stream) if prepass else None


def run_tensor_prepass(params: MergeParams, stream: Stream) -> Stats | None:
    """Read one tensor, which `stream` gives in stretches, before the first of them is merged; None: not needed."""
    prepass = METHODS[params.method].tensor_prepass
    return prepass(params, stream) if prepass else None


def _scaling(params: TaskArithmeticParams | TiesParams | DareLinearParams | DareTiesParams) -> float:
    if params.scaling == "auto":
        raise ValueError(f"{params.method}: scaling 'auto' must be replaced by a number before merging")
    return params.scaling


def _pretrained(
    base: Tensor, task_vectors: Mapping[str, Tensor], *, params: PretrainedParams, name: str, stats: Stats | None = None
) -> Tensor:
    return base.float()


def _average(
    base: Tensor, task_vectors: Mapping[str, Tensor], *, params: AverageParams, name: str, stats: Stats | None = None
) -> Tensor:
    return weight_average(base, task_vectors)


def _task_arithmetic(
    base: Tensor,
    task_vectors: Mapping[str, Tensor],
    *,
    params: TaskArithmeticParams,
    name: str,
    stats: Stats | None = None,
) -> Tensor:
    return task_arithmetic(base, task_vectors, _scaling(params))


def _ties(
    base: Tensor, task_vectors: Mapping[str, Tensor], *, params: TiesParams, name: str, stats: Stats | None = None
) -> Tensor:
    thresholds = stats
    if thresholds is None and params.scope == "tensor":
        thresholds = tensor_thresholds(task_vectors, params.density)
    if thresholds is None:
        raise ValueError("ties over the whole model needs the thresholds of run_prepass as stats")
    return ties(base, task_vectors, thresholds=thresholds, scaling=_scaling(params))


def _ties_prepass(params: TiesParams, stream: Stream) -> Stats | None:
    return model_thresholds(stream, params.density) if params.scope == "model" else None


def _ties_tensor_prepass(params: TiesParams, stream: Stream) -> Stats | None:
    return model_thresholds(stream, params.density) if params.scope == "tensor" else None


def _drop(
    task_vectors: Mapping[str, Tensor], params: DareLinearParams | DareTiesParams, name: str, at: int
) -> dict[str, Tensor]:
    return {
        expert: dare(vector, density=params.density, seed=params.seed, expert=expert, name=name, at=at)
        for expert, vector in task_vectors.items()
    }


def _dare_linear(
    base: Tensor,
    task_vectors: Mapping[str, Tensor],
    *,
    params: DareLinearParams,
    name: str,
    stats: Stats | None = None,
    at: int = 0,
) -> Tensor:
    return task_arithmetic(base, _drop(task_vectors, params, name, at), _scaling(params))


def _dare_ties(
    base: Tensor,
    task_vectors: Mapping[str, Tensor],
    *,
    params: DareTiesParams,
    name: str,
    stats: Stats | None = None,
    at: int = 0,
) -> Tensor:
    return base.float() + _scaling(params) * disjoint_mean(_drop(task_vectors, params, name, at))


METHODS: Mapping[str, MergeMethod] = MappingProxyType(
    {
        method.name: method
        for method in (
            MergeMethod(
                "pretrained",
                _pretrained,
                PretrainedParams,
                "arXiv:2406.15479",
                coefficient=lambda params, count: 0.0,
                streams=True,
            ),
            MergeMethod(
                "average",
                _average,
                AverageParams,
                "arXiv:2203.05482",
                coefficient=lambda params, count: 1 / count,
                streams=True,
            ),
            MergeMethod(
                "task_arithmetic",
                _task_arithmetic,
                TaskArithmeticParams,
                "arXiv:2212.04089",
                coefficient=lambda params, count: _scaling(params),
                streams=True,
            ),
            MergeMethod(
                "ties",
                _ties,
                TiesParams,
                "arXiv:2306.01708",
                prepass=_ties_prepass,
                tensor_prepass=_ties_tensor_prepass,
                streams=True,
            ),
            MergeMethod("dare_linear", _dare_linear, DareLinearParams, "arXiv:2311.03099", streams=True, draws=True),
            MergeMethod(
                "dare_ties", _dare_ties, DareTiesParams, "arXiv:2311.03099, arXiv:2306.01708", streams=True, draws=True
            ),
        )
    }
)
