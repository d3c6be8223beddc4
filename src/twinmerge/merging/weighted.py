"""Merges with a weight and a density for every model, on any stretch of a tensor, rounded once, by the caller.

These are the definitions that mergekit's recipes ask for. A weight multiplies a task vector; `normalize` divides by
the weights that took part. Averages and task arithmetic are computed in float64; what is trimmed or dropped is added up
in float32, in which task vectors are, and added to the base in float64.
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
    total = total_weight(weights) if normalize else 1.0
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
    """Base + scaling * sum_i w_i (expert_i - base), divided by sum_i w_i if asked to (arXiv:2212.04089).

    Raises:
        RecipeError: if the weights to divide by sum to zero.
    """
    if normalize:
        scaling /= total_weight(weights)
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
        vectors[name] = vector.mul_(torch.ge(vector.abs(), thresholds[name], out=torch.empty_like(vector)))
        vectors[name] *= weights[name]
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
    start = base.float()
    factors = {name: weights[name] / densities[name] if rescale else weights[name] for name in experts}

    def kept(name: str) -> Tensor:
        dropped = drop_mask(at + len(base), densities[name], seed, name, tensor, at)
        return dropped.logical_not_().view(torch.uint8).float()

    def vector(name: str) -> Tensor:
        return experts[name].to(torch.float32, copy=True).sub_(start)

    if elect:
        vectors = {name: vector(name).mul_(kept(name)).mul_(factors[name]) for name in experts}
        return _elect(base, vectors, weights, scaling=scaling, normalize=normalize)
    change = torch.zeros_like(start)
    for name in sorted(experts):
        change.addcmul_(vector(name), kept(name), value=factors[name])
    return change.double().mul_(scaling / total_weight(weights) if normalize else scaling).add_(base.double())


def _elect(
    base: Tensor, vectors: Mapping[str, Tensor], weights: Mapping[str, float], *, scaling: float, normalize: bool
) -> Tensor:
    """Base + scaling * sum of the weighted vectors that have the sign of their sum; a sum of 0 counts as positive."""
    ordered = [vectors[name] for name in sorted(vectors)]
    elected = sum(ordered, start=torch.zeros_like(ordered[0]))
    torch.ge(elected, 0, out=elected).mul_(2).sub_(1)
    total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
    for name in sorted(vectors):
        agrees = vectors[name] * elected
        torch.gt(agrees, 0, out=agrees)
        total.addcmul_(vectors[name], agrees)
        divisor.add_(agrees, alpha=weights[name])
    if normalize:
        total.div_(divisor.masked_fill_(divisor == 0, 1.0))
    return total.double().mul_(scaling).add_(base.double())


def _zeros(models: Mapping[str, Tensor]) -> Tensor:
    return torch.zeros(len(next(iter(models.values()))), dtype=torch.float64)


def total_weight(weights: Mapping[str, float]) -> float:
    """What normalised weights are divided by.

    Raises:
        RecipeError: if they sum to zero.
    """
    total = sum(weights.values())
    if abs(total) < 1e-8:
        given = ", ".join(f"{name} {weight:g}" for name, weight in sorted(weights.items()))
        raise RecipeError(f"the weights must not sum to zero when they are normalised, found {given}")
    return total
