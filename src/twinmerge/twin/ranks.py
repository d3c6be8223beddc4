"""Chooses how much exclusive knowledge is kept: rank policies, the best scaling, and the compression itself."""

import hashlib
import json
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from twinmerge.tensors.low_rank import LowRank, as_matrix, compress_product, decompose, truncate
from twinmerge.tensors.parts import Part
from twinmerge.tensors.sparse import keep_largest, keep_random
from twinmerge.tensors.whitening import Whitening
from twinmerge.twin.recipe import ExclusiveSettings

Key = tuple[str, str]
"""(parameter name, expert name)."""


def compress(
    difference: Tensor,
    settings: ExclusiveSettings,
    *,
    seed: int,
    expert: str,
    name: str,
    whitening: Whitening | None = None,
) -> tuple[Part, Tensor | None]:
    """Compress one matrix of exclusive knowledge (METHOD §3).

    Args:
        difference: expert minus shared expert, 2-D or a convolution's 4-D, float32.
        settings: how much is kept; energy and budget keep everything here and truncate later, by `choose_ranks`.
        seed: of `random` sparsification, and of the search for the leading directions.
        expert: the expert's name, part of the random key of sparsification.
        name: the parameter's name, part of the random keys.
        whitening: what directions are weighed by, for `svd`; None weighs all alike.

    Returns:
        The compressed matrix (out, in*kh*kw), and its singular values: those kept where a rank is given, else all (an
        energy or a budget is shared out by the whole spectrum, which is exact); those of the whitened matrix where
        there is one; None for the sparse compressions.
    """
    matrix = as_matrix(difference)
    if settings.compression == "magnitude":
        return keep_largest(matrix, settings.density or 0.0), None
    if settings.compression == "random":
        return keep_random(matrix, settings.density or 0.0, seed, expert, name), None
    if whitening is not None:
        factors, values = _directions(whitening.apply(matrix), settings, seed, name)
        return whitening.undo(factors, matrix.dtype), values
    return _directions(matrix, settings, seed, name)


def compress_factors(
    difference: LowRank, settings: ExclusiveSettings, whitening: Whitening | None = None
) -> tuple[LowRank, Tensor]:
    """As `compress`, of a matrix that is given as a pair of any rank; it is not formed."""
    up, down = difference.up, difference.down
    if whitening is not None:
        up, down = whitening.apply_up(up), whitening.apply_down(down)
    factors, values = compress_product([up], [down])
    if settings.rank is not None:
        factors = factors.truncate(min(settings.rank, factors.rank))
    return factors if whitening is None else whitening.undo(factors, difference.dtype), values


def _directions(matrix: Tensor, settings: ExclusiveSettings, seed: int, name: str) -> tuple[LowRank, Tensor]:
    """The leading singular directions of a matrix, as many as a rank asks for, else all."""
    if settings.rank is None:
        return decompose(matrix)
    drawn = hashlib.sha256(json.dumps([seed, name]).encode()).digest()[:7]
    factors = truncate(matrix, min(settings.rank, *matrix.shape), int.from_bytes(drawn, "little"))
    return factors, factors.up.norm(dim=0)


def choose_ranks(
    spectra: Mapping[Key, Tensor],
    settings: ExclusiveSettings,
    *,
    budget_bytes: int | None,
    cost: Mapping[str, int],
) -> dict[Key, int]:
    """Map the singular values of all matrices of all experts to ranks (METHOD §3).

    Args:
        spectra: singular values (min(out, in),) in descending order.
        settings: rank, energy or budget.
        budget_bytes: what all factors may take together, for a budget.
        cost: bytes of one stored direction of every parameter.

    Returns:
        A rank for every key, 0 included.
    """
    if settings.rank is not None:
        return {key: min(settings.rank, len(values)) for key, values in spectra.items()}
    if settings.energy is not None:
        return {key: _rank_for_energy(values, settings.energy) for key, values in spectra.items()}
    return _ranks_for_budget(spectra, budget_bytes or 0, cost)


def _rank_for_energy(values: Tensor, energy: float) -> int:
    squares = values.double().square().cumsum(0)
    if len(squares) == 0 or squares[-1] == 0:
        return 0
    reached = squares / squares[-1] >= energy - 1e-12
    return int(reached.nonzero()[0]) + 1


def _ranks_for_budget(spectra: Mapping[Key, Tensor], budget_bytes: int, cost: Mapping[str, int]) -> dict[Key, int]:
    """Greedy by energy per stored byte: all directions of all matrices of all experts compete.

    Within a matrix values descend, so the chosen directions of a matrix are always its first ones. A direction that no
    longer fits ends its matrix; smaller matrices may still use what is left.
    """
    keys = sorted(spectra)
    owner = np.concatenate([np.full(len(spectra[key]), index) for index, key in enumerate(keys)] or [np.empty(0, int)])
    gain = np.concatenate(
        [spectra[key].double().square().numpy() / cost[key[0]] for key in keys] or [np.empty(0, dtype=np.float64)]
    )
    ranks = dict.fromkeys(keys, 0)
    closed: set[Key] = set()
    left = budget_bytes
    for index in np.argsort(-gain, kind="stable"):
        key = keys[int(owner[index])]
        if gain[index] <= 0 or len(closed) == len(keys):
            break
        if key in closed:
            continue
        if cost[key[0]] > left:
            closed.add(key)
            continue
        ranks[key] += 1
        left -= cost[key[0]]
    return ranks


def best_scaling(task_vectors: Mapping[str, Tensor], direction: Tensor, rank: int) -> float:
    """Find the scaling that leaves the least for truncation to throw away (METHOD §2, `scaling: auto`).

    Minimises `sum_t tail_r(task_vector_t - scaling * direction)`, tail_r being the squared singular values beyond
    `rank`. Where nothing is thrown away (1-D, or kept whole) or everything is, the least-squares scaling is returned.

    Args:
        task_vectors: expert minus base of one parameter, float32, by expert.
        direction: the merge at scaling 1 minus the base, shaped alike.
        rank: the rank that will be kept, or the mean rank that a budget allows.

    Returns:
        The scaling, rounded to four digits so that the order of float sums does not change it; 0 where `direction` is
        zero.
    """
    names = sorted(task_vectors)
    norm = float(direction.double().square().sum())
    if norm == 0:
        return 0.0
    least_squares = sum(float((task_vectors[n].double() * direction.double()).sum()) for n in names) / (
        len(names) * norm
    )
    if direction.ndim < 2 or rank == 0 or rank >= min(as_matrix(direction).shape):
        return round(least_squares, 4)
    matrices = [as_matrix(task_vectors[n]).float() for n in names]
    merged = as_matrix(direction).float()
    if merged.shape[0] < merged.shape[1]:
        matrices, merged = [m.T for m in matrices], merged.T
    squared = merged.T @ merged
    grams = torch.stack([m.T @ m for m in matrices])
    crossed = torch.stack([m.T @ merged for m in matrices])
    crossed = crossed + crossed.mT

    def tail(scaling: float) -> float:
        values = torch.linalg.eigvalsh(grams - scaling * crossed + scaling * scaling * squared)
        return float(values[:, : values.shape[1] - rank].clamp_min(0).double().sum())

    found = _golden_section(tail, 0.0, 2.0 * max(least_squares, 1.0 / len(names)))
    candidates = [round(scaling, 4) for scaling in (least_squares, 1.0 / len(names), 0.3, found)]
    tails = [tail(scaling) for scaling in candidates]
    noise = torch.finfo(torch.float32).eps * float(grams.diagonal(dim1=1, dim2=2).sum()) * len(squared)
    return next(scaling for scaling, left in zip(candidates, tails, strict=True) if left <= min(tails) + noise)


def _golden_section(function: Callable[[float], float], low: float, high: float, steps: int = 10) -> float:
    ratio = (5**0.5 - 1) / 2
    inner_low, inner_high = high - ratio * (high - low), low + ratio * (high - low)
    value_low, value_high = function(inner_low), function(inner_high)
    for _ in range(steps):
        if value_low <= value_high:
            high, inner_high, value_high = inner_high, inner_low, value_low
            inner_low = high - ratio * (high - low)
            value_low = function(inner_low)
        else:
            low, inner_low, value_low = inner_low, inner_high, value_high
            inner_high = low + ratio * (high - low)
            value_high = function(inner_high)
    return inner_low if value_low <= value_high else inner_high
