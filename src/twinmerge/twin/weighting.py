"""Finds what the directions of each expert's matrices are weighed by, in what was measured on its inputs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from twinmerge.files.checkpoint import Checkpoint
from twinmerge.tensors.whitening import Whitening

LEFT, RIGHT, SIZES = "/left", "/right", "/sizes"
"""After a parameter's name: the second moment of its matrix's rows and of its columns, and both mean diagonals."""


@dataclass(frozen=True)
class Weighting:
    """Second moments by expert: of what each layer reads and of the gradients on what it says (METHOD §3)."""

    measured: Mapping[str, Checkpoint]

    def of(self, expert: str, name: str, shape: tuple[int, int]) -> Whitening:
        """The weights of a matrix (out, in): those measured, else the same for every direction, of a usual size.

        A layer that no row reached is no less important than others: nothing is known of it.
        """
        found = self.measured[expert]
        if self._size(expert, name):
            sides = [found.read(name + side) if name + side in found.specs else None for side in (LEFT, RIGHT)]
            left, right = (torch.ones(n) if m is None else m for n, m in zip(shape, sides, strict=True))
            return Whitening.of(left, right)
        ones = [torch.ones(n, dtype=torch.float64) for n in shape]
        return Whitening(ones[0] * math.sqrt(self._usual[expert]), ones[1])

    def _size(self, expert: str, name: str) -> float:
        found = self.measured[expert]
        if name + SIZES not in found.specs:
            return 0.0
        sizes: Tensor = found.read(name + SIZES)
        return float(sizes.prod())

    @cached_property
    def _usual(self) -> dict[str, float]:
        """The geometric mean of what was measured of an expert's matrices."""
        usual = {}
        for expert, found in self.measured.items():
            names = [name.removesuffix(SIZES) for name in found.specs if name.endswith(SIZES)]
            logs = [math.log(size) for name in names if (size := self._size(expert, name))]
            usual[expert] = math.exp(sum(logs) / len(logs)) if logs else 1.0
        return usual
