"""Merges two experts by NuSLERP: the arc between their task vectors, or between the models where there is no base."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from twinmerge.merging.method import Weighted, merge_method
from twinmerge.merging.products import ByProducts, cosines

_STRAIGHT = 1e-8
"""Sine under which the arc is taken for a straight line."""


@merge_method("nuslerp", paper="doi:10.1145/325165.325242")
class NuSlerp(ByProducts, Weighted):
    """The point of the arc that the experts' weights say, divided by their sum; mergekit's method of that name."""

    needs_base = False

    def misfit(self, experts: Collection[str]) -> str | None:
        """Also other than two experts, and weights that cancel."""
        if fault := super().misfit(experts):
            return fault
        if len(experts) != 2:
            return f"nuslerp goes from one model to another, found {len(experts)} besides the base"
        return None if abs(sum(self.weights(experts).values())) >= 1e-8 else "the weights must not sum to zero"

    def combination(
        self, gram: Float64[Tensor, "experts experts"], experts: Sequence[str]
    ) -> Float64[Tensor, " experts"]:
        """sin(share * angle) / sin(angle) for each; the shares themselves where the two lie in one line."""
        weights = self.weights(experts)
        share = torch.tensor([weights[name] / sum(weights.values()) for name in experts], dtype=torch.float64)
        angle = math.acos(float(cosines(gram)[0, 1]))
        return share if math.sin(angle) <= _STRAIGHT else torch.sin(share * angle) / math.sin(angle)
