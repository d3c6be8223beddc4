"""Merges by SLERP: turns the base towards one expert along the arc between them, not along the straight line."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Annotated

from pydantic import Field
from torch import Tensor

from twinmerge.merging.method import Chunk, Chunks, Method, merge_method
from twinmerge.merging.statistics import Statistics

_PARALLEL = 0.9995
"""Cosine from which on the arc is taken for a straight line."""


@merge_method("slerp", paper="doi:10.1145/325165.325242")
class Slerp(Method):
    """The point at `t` of the arc, 0 being the base and 1 the expert (Shoemake 1985)."""

    uses = ("merge",)
    t: Annotated[float, Field(ge=0, le=1, description="in [0, 1]")] = 0.5

    def misfit(self, experts: Collection[str]) -> str | None:
        """More than one expert."""
        if len(experts) == 1:
            return None
        return f"slerp goes from the base to one other model, found {len(experts)} others"

    def measure(self, tensor: Chunks, statistics: Statistics) -> float:
        """The cosine of the angle between the two, added up in float64; 1 if one is zero."""
        product = first = second = 0.0
        for chunk in tensor():
            one, other = chunk.base_value(), chunk.value(chunk.names[0])
            product += float(one @ other)
            first += float(one @ one)
            second += float(other @ other)
        norm = math.sqrt(first) * math.sqrt(second)
        return product / norm if norm else 1.0

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The point at `t` of the arc."""
        start, end = 1 - self.t, self.t
        if abs(statistics.tensor) <= _PARALLEL:
            angle = math.acos(statistics.tensor)
            start, end = math.sin(start * angle) / math.sin(angle), math.sin(end * angle) / math.sin(angle)
        return chunk.base_value().mul_(start).add_(chunk.value(chunk.names[0]), alpha=end)
