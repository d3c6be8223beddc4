"""Merges experts by Multi-SLERP: the mean of their directions, at the mean of their lengths."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from twinmerge.merging.method import Weighted, merge_method
from twinmerge.merging.products import ByProducts, cosines

_CANCELLED = 1e-8
"""Length of the mean direction under which there is none."""


@merge_method("multislerp", paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea")
class MultiSlerp(ByProducts, Weighted):
    """sum_t w_t |v_t| times the direction of sum_t w_t v_t / |v_t|, v_t task vectors, or models without a base.

    The source goes on from that direction along the weighted mean of the tangents there, which is zero.
    """

    needs_base = False
    normalize_weights: bool = True

    def misfit(self, experts: Collection[str]) -> str | None:
        """Also weights that cancel."""
        if fault := super().misfit(experts):
            return fault
        cancels = self.normalize_weights and abs(sum(self.weights(experts).values())) < 1e-8
        return "the weights must not sum to zero when they are normalised" if cancels else None

    def combination(
        self, gram: Float64[Tensor, "experts experts"], experts: Sequence[str]
    ) -> Float64[Tensor, " experts"]:
        """Of directions that cancel, or vectors of zeros, the weights alone: their straight mean."""
        weights = torch.tensor([self.weights(experts)[name] for name in experts], dtype=torch.float64)
        if len(experts) == 1:
            return torch.ones(1, dtype=torch.float64)
        weights = weights / weights.sum() if self.normalize_weights else weights
        norms = gram.diagonal().sqrt()
        length = (weights @ cosines(gram) @ weights).clamp_min(0).sqrt()
        if length < _CANCELLED:
            return weights
        return torch.where(norms > 0, weights * (weights @ norms) / (norms * length), 0.0)
