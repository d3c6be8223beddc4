"""Merges by SLERP: turns the base towards one expert along the arc between them, not along the straight line."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from twinmerge.merging.method import Chunk, Chunks, Method, merge_method
from twinmerge.merging.statistics import Statistics

_PARALLEL = 0.9995
"""Cosine from which on the arc is taken for a straight line."""


@merge_method("slerp", paper="doi:10.1145/325165.325242")
class Slerp(Method):
    """The point at `t` of the arc, 0 being the base and 1 the expert (Shoemake 1985)."""

    t: Annotated[float, Field(ge=0, le=1, description="in [0, 1]")] = 0.5

    def misfit(self, experts: Collection[str]) -> str | None:
        """More than one expert."""
        if len(experts) == 1:
            return None
        return f"slerp goes from the base to one other model, found {len(experts)} others"

    def measure(self, tensor: Chunks, statistics: Statistics) -> Arc:
        """The angle between the two."""
        return Arc.between((chunk.base_value(), chunk.value(chunk.names[0])) for chunk in tensor())

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The point at `t` of the arc."""
        first, second = statistics.tensor.coefficients(self.t)
        return chunk.base_value().mul_(first).add_(chunk.value(chunk.names[0]), alpha=second)


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
