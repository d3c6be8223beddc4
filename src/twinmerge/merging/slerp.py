"""SLERP: turn one model towards another along the arc between them, instead of along the straight line."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

_PARALLEL = 0.9995
"""Cosine from which on the arc is taken for a straight line."""


@dataclass(frozen=True)
class Arc:
    """Where two tensors lie to each other: the cosine of their angle."""

    cosine: float

    @classmethod
    def between(cls, chunks: Iterable[tuple[Float[Tensor, " entries"], Float[Tensor, " entries"]]]) -> Arc:
        """The arc between two tensors that come in stretches, added up in float64; parallel if one is zero."""
        product = first = second = 0.0
        for a, b in chunks:
            one, other = a.double(), b.double()
            product += float(one @ other)
            first += float(one @ one)
            second += float(other @ other)
        norm = math.sqrt(first) * math.sqrt(second)
        return cls(product / norm if norm else 1.0)

    def coefficients(self, t: float) -> tuple[float, float]:
        """What the two tensors are multiplied with at `t`, 0 being the first and 1 the second."""
        if abs(self.cosine) > _PARALLEL:
            return 1 - t, t
        angle = math.acos(self.cosine)
        return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
