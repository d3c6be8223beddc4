"""Somebody else's merge method: one file outside the package."""

import torch
from pydantic import field_validator
from torch import Tensor

from twinmerge.merging.method import Chunk, Method, Weight, merge_method, of_expert
from twinmerge.merging.statistics import Statistics


@merge_method("quietest", paper="arXiv:0000.00000")
class Quietest(Method):
    """Of each entry, the weighted task vector that is smallest (or largest), times `pull`."""

    weight: Weight = 1.0
    pull: float = 1.0
    loudest: bool = False
    limit: float | None = None

    @field_validator("pull")
    @classmethod
    def _pulls(cls, pull: float) -> float:
        if pull == 0:
            raise ValueError("0 pulls nowhere")
        return pull

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """Base and chosen changes."""
        moved = torch.stack([chunk.task_vector(name) * of_expert(self.weight, name) for name in chunk.names])
        sizes = moved.abs().neg() if self.loudest else moved.abs()
        return chunk.base_value() + self.pull * moved.gather(0, sizes.min(dim=0, keepdim=True).indices)[0]
