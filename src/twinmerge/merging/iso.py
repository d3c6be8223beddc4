"""Merges experts with isotropic spectra: every direction counts alike (Iso-C and Iso-CTS, arXiv:2502.04959)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.merging.method import Chunk, merge_method
from twinmerge.merging.spectra import Directions, Spectral, leading, orthonormal, shape_of


@merge_method("iso_c", paper="arXiv:2502.04959")
class IsoC(Spectral):
    """theta_0 + lambda times the sum of task vectors with each singular value replaced by their mean."""

    def change(self, chunk: Chunk) -> Tensor:
        """The sum's directions, all of them alike."""
        common = leading(chunk.total(torch.float64))
        return (common.left * _mean([common])) @ common.right.T


@merge_method("iso_cts", paper="arXiv:2502.04959")
class IsoCts(Spectral):
    """Iso-C with the sum's last directions given up for those that each task has beside its first ones."""

    common_fraction: Annotated[float, Field(gt=0, le=1, description="in (0, 1]")] = 0.8
    """How many of the directions are the sum's; the tasks share the rest equally."""

    def change(self, chunk: Chunk) -> Tensor:
        """The sum's first directions and each task's own, orthonormal, all of them alike."""
        sides, count = min(shape_of(chunk)), len(chunk.names)
        own = round((sides - int(sides * self.common_fraction)) / count)
        common = leading(chunk.total(torch.float64), sides - own * count)
        found = []
        for name in chunk.names:
            vector = chunk.task_vector(name, torch.float64)
            found.append(leading(vector - common.left @ (common.left.T @ vector), own))
        found.append(common)
        left = orthonormal(torch.cat([part.left for part in found], dim=1))
        right = orthonormal(torch.cat([part.right for part in found], dim=1))
        return (left * _mean(found)) @ right.T


def _mean(parts: list[Directions]) -> float:
    """Of the singular values; 0 where there are none."""
    values = torch.cat([part.values for part in parts])
    return float(values.mean()) if len(values) else 0.0
