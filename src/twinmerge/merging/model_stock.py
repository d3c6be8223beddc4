"""Merges experts by Model Stock: from the base towards their mean, as far as their angles say (arXiv:2403.19522)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from twinmerge.merging.method import merge_method
from twinmerge.merging.products import ByProducts, cosines

_SINGULAR = 1e-6
"""Denominator under which experts pull against each other so evenly that the tensor stays the base's."""


@merge_method("model_stock", paper="arXiv:2403.19522")
class ModelStock(ByProducts):
    """theta_0 + t mean_t tau_t, t = T cos / (1 + (T - 1) cos), cos the mean over pairs of experts, tensor by tensor."""

    def combination(
        self, gram: Float64[Tensor, "experts experts"], experts: Sequence[str]
    ) -> Float64[Tensor, " experts"]:
        """The same share for every expert; a single one is taken whole, as none disagrees with it."""
        count = len(experts)
        cosine = 1.0
        if count > 1:
            above = torch.triu_indices(count, count, offset=1)
            cosine = float(cosines(gram)[above[0], above[1]].mean())
        below = 1 + (count - 1) * cosine
        t = count * cosine / below if abs(below) >= _SINGULAR else 0.0
        return torch.full((count,), t / count, dtype=torch.float64)
