"""Merges with a weight and a density for every model, on any stretch of a tensor; sums in float64, rounded by the caller.

These are the definitions that mergekit's recipes ask for. A weight multiplies a task vector; `normalize` divides by
the weights that took part.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from twinmerge.errors import RecipeError
from twinmerge.tensors.sparse import drop_mask


def weighted_average(
    models: Mapping[str, Float[Tensor, " entries"]], weights: Mapping[str, float], *, normalize: bool
) -> Float64[Tensor, " entries"]:
    """sum_i w_i model_i, divided by sum_i w_i if asked to.

    Raises:
        RecipeError: if the weights to divide by sum to zero.
    """
    total = _total(weights) if normalize else 1.0
    merged = _zeros(models)
    for name in sorted(models):
        merged.add_(models[name].double(), alpha=weights[name] / total)
    return merged


def weighted_task_arithmetic(
    base: Float[Tensor, " entries"],
    experts: Mapping[str, Float[Tensor, " entries"]],
    weights: Mapping[str, float],
    *,
    scaling: float,
    normalize: bool,
) -> Float64[Tensor, " entries"]:
    """base + scaling * sum_i w_i (expert_i - base), divided by sum_i w_i if asked to (arXiv:2212.04089).

    Raises:
        RecipeError: if the weights to divide by sum to zero.
    """
    if normalize:
        scaling /= _total(weights)
    wide, change = base.double(), _zeros(experts)
    for name in sorted(experts):
        change.add_(experts[name].double().sub_(wide), alpha=weights[name])
    return change.mul_(scaling).add_(wide)


def weighted_ties(
    base: Float[Tensor, " entries"],
    experts: Mapping[str, Float[Tensor, " entries"]],
    weights: Mapping[str, float],
    *,
    thresholds: Mapping[str, float],
    scaling: float,
    normalize: bool,
) -> Float64[Tensor, " entries"]:
    """Trim, elect the sign of the weighted sum, add up what agrees with it (arXiv:2306.01708).

    Args:
        base: entries of the base.
        experts: the same entries of the experts.
        weights: by expert.
        thresholds: smallest magnitude of a task vector that is kept, by expert.
        scaling: of what was added up.
        normalize: divide by the weights of the experts that agree.
    """
    start, vectors = base.float(), {}
    for name in sorted(experts):
        vector = experts[name].float().sub(start)
        vectors[name] = vector.mul_(vector.abs() >= thresholds[name])
    return _elect(base, vectors, weights, scaling=scaling, normalize=normalize)


def weighted_dare(
    base: Float[Tensor, " entries"],
    experts: Mapping[str, Float[Tensor, " entries"]],
    weights: Mapping[str, float],
    *,
    densities: Mapping[str, float],
    rescale: bool,
    scaling: float,
    normalize: bool,
    elect: bool,
    seed: int,
    tensor: str,
    at: int,
) -> Float64[Tensor, " entries"]:
    """Drop entries at random, then task arithmetic, or TIES' election of signs (arXiv:2311.03099).

    Args:
        base: entries of the base.
        experts: the same entries of the experts.
        weights: by expert.
        densities: fraction of the entries kept, by expert.
        rescale: divide what is kept by its density.
        scaling: of the sum.
        normalize: divide by the weights that took part.
        elect: elect signs before adding up.
        seed: of the draws.
        tensor: the tensor's name, which the draws depend on.
        at: which entry of the tensor the first one is.

    Raises:
        RecipeError: if the weights to divide by sum to zero.
    """
    start, vectors = base.float(), {}
    for name in sorted(experts):
        density = densities[name]
        kept = drop_mask(len(base), density, seed, name, tensor, at, at + len(base)).logical_not_()
        vectors[name] = experts[name].float().sub(start).mul_(kept)
        if rescale and elect:
            vectors[name] /= density
    if elect:
        return _elect(base, vectors, weights, scaling=scaling, normalize=normalize)
    factor = scaling / _total(weights) if normalize else scaling
    wide, change = base.double(), _zeros(experts)
    for name in sorted(vectors):
        change.add_(vectors[name].double(), alpha=weights[name] / densities[name] if rescale else weights[name])
    return change.mul_(factor).add_(wide)


def _elect(
    base: Tensor, vectors: Mapping[str, Tensor], weights: Mapping[str, float], *, scaling: float, normalize: bool
) -> Tensor:
    """base + scaling * sum of the weighted vectors that have the sign of their sum; a sum of 0 counts as positive."""
    for name in sorted(vectors):
        vectors[name].mul_(weights[name])
    ordered = [vectors[name] for name in sorted(vectors)]
    elected = (sum(ordered[1:], start=ordered[0]) >= 0).float().mul_(2).sub_(1)
    total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
    for name in sorted(vectors):
        agrees = ((vectors[name] * elected) > 0).float()
        total.addcmul_(vectors[name], agrees)
        divisor.add_(agrees, alpha=weights[name])
    if normalize:
        total.div_(divisor.masked_fill_(divisor == 0, 1.0))
    return total.double().mul_(scaling).add_(base.double())


def _zeros(models: Mapping[str, Tensor]) -> Tensor:
    return torch.zeros(len(next(iter(models.values()))), dtype=torch.float64)


def _total(weights: Mapping[str, float]) -> float:
    total = sum(weights.values())
    if abs(total) < 1e-8:
        given = ", ".join(f"{name} {weight:g}" for name, weight in sorted(weights.items()))
        raise RecipeError(f"the weights must not sum to zero when they are normalised, found {given}")
    return total
