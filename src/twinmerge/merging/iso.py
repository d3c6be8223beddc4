"""Merges experts with isotropic spectra: every direction counts alike (Iso-C and Iso-CTS, arXiv:2502.04959)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.merging.method import Chunk, Scaled, merge_method
from twinmerge.merging.spectra import (
    Directions,
    is_layer,
    leading,
    mean_change,
    memory_bytes,
    orthonormal,
    shape_of,
)
from twinmerge.merging.statistics import Statistics


class _Isotropic(Scaled):
    whole = True

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The base and a matrix of one singular value; the mean of other tensors."""
        change = self.flat(chunk) if is_layer(chunk) else mean_change(chunk)
        return change.mul_(self.factor).add_(chunk.base_value())

    @abstractmethod
    def flat(self, chunk: Chunk) -> Tensor:
        """What is added to a matrix at scaling 1, float64."""

    def memory_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        """All directions of the sum, and of one task at a time."""
        return memory_bytes(shape, experts)


@merge_method("iso_c", paper="arXiv:2502.04959")
class IsoC(_Isotropic):
    """theta_0 + lambda times the sum of task vectors with each singular value replaced by their mean."""

    def flat(self, chunk: Chunk) -> Tensor:
        """The sum's directions, all of them alike."""
        common = leading(_sum(chunk))
        return (common.left * _mean([common])) @ common.right.T


@merge_method("iso_cts", paper="arXiv:2502.04959")
class IsoCts(_Isotropic):
    """Iso-C with the sum's last directions given up for those that each task has beside its first ones."""

    common_fraction: Annotated[float, Field(gt=0, le=1, description="in (0, 1]")] = 0.8
    """How many of the directions are the sum's; the tasks share the rest equally."""

    def flat(self, chunk: Chunk) -> Tensor:
        """The sum's first directions and each task's own, orthonormal, all of them alike."""
        sides, count = min(shape_of(chunk)), len(chunk.names)
        own = round((sides - int(sides * self.common_fraction)) / count)
        common = leading(_sum(chunk), sides - own * count)
        found = []
        for name in chunk.names:
            vector = chunk.task_vector(name, torch.float64)
            found.append(leading(vector - common.left @ (common.left.T @ vector), own))
        found.append(common)
        left = orthonormal(torch.cat([part.left for part in found], dim=1))
        right = orthonormal(torch.cat([part.right for part in found], dim=1))
        return (left * _mean(found)) @ right.T


def _sum(chunk: Chunk) -> Tensor:
    total = chunk.task_vector(chunk.names[0], torch.float64)
    for name in chunk.names[1:]:
        total.add_(chunk.task_vector(name, torch.float64))
    return total


def _mean(parts: list[Directions]) -> float:
    """Of the singular values; 0 where there are none."""
    values = torch.cat([part.values for part in parts])
    return float(values.mean()) if len(values) else 0.0
