"""Merges experts by their Karcher mean: the point of the sphere nearest to their directions (arXiv:2603.04972)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float64
from pydantic import Field
from torch import Tensor

from twinmerge.merging.method import merge_method
from twinmerge.merging.products import ByProducts, cosines


@merge_method("karcher", paper="arXiv:2603.04972")
class Karcher(ByProducts):
    """The models' mean direction along the sphere, found by steps in its tangent, at the mean of their lengths."""

    uses_base = False
    max_iter: Annotated[int, Field(ge=1)] = 10
    """Steps, at most."""
    tol: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-5
    """Length of the last step; vectors that are shorter have no direction."""

    def combination(
        self, gram: Float64[Tensor, "experts experts"], experts: Sequence[str]
    ) -> Float64[Tensor, " experts"]:
        """The mean's coordinates by model: every step stays in what they span."""
        norms = gram.diagonal().sqrt()
        there = norms > self.tol
        if not bool(there.any()):
            return torch.zeros(len(experts), dtype=torch.float64)
        between = cosines(gram)[there][:, there]
        mean = _unit(torch.full((len(between),), 1.0 / len(between), dtype=torch.float64), between, self.tol)
        for _ in range(self.max_iter):
            cosine = (between @ mean).clamp(-1, 1)
            angle = cosine.arccos()
            pull = torch.where(angle >= self.tol, angle / angle.sin(), 0.0) / len(between)
            step = pull - (pull @ cosine) * mean
            length = _length(step, between)
            if length < self.tol:
                break
            mean = _unit(length.cos() * mean + length.sin() / length * step, between, self.tol)
        found = torch.zeros(len(experts), dtype=torch.float64)
        found[there] = mean / norms[there] * norms.mean()
        return found


def _length(coordinates: Float64[Tensor, " units"], between: Float64[Tensor, "units units"]) -> Float64[Tensor, ""]:
    return (coordinates @ between @ coordinates).clamp_min(0).sqrt()


def _unit(
    coordinates: Float64[Tensor, " units"], between: Float64[Tensor, "units units"], tol: float
) -> Float64[Tensor, " units"]:
    """Of length 1; the first direction where they cancel."""
    length = _length(coordinates, between)
    if length >= tol:
        return coordinates / length
    return torch.eye(len(coordinates), dtype=torch.float64)[0]
