"""Weighs the directions of a weight difference by what they change: moments of a layer's inputs and gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from twinmerge.tensors.low_rank import LowRank

_DAMPING = 0.1
"""Of the mean diagonal, added to a moment: directions that no row used still count a little."""


@dataclass(frozen=True)
class Whitening:
    """Square roots of both second moments of a matrix `D (out, in)`: what is decomposed is `L' D R` (METHOD §3).

    With the moments `L L'` of the gradients on the matrix's outputs and `R R'` of its inputs, the squared norm of
    `L' D R` is what `D` changes of the model's answers in the mean, to first order, where inputs and gradients are
    independent; so its singular directions are the ones to keep.

    A side is a lower triangle (n, n), or (n,) where the moment is diagonal; all in float64.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, left: Float[Tensor, "out *out"], right: Float[Tensor, "in *in"]) -> Whitening:
        """Take both moments, positive semi-definite and not zero, (n, n) or the diagonal (n,)."""
        return cls(_root(left), _root(right))

    def apply(self, matrix: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """`L' D R`, float64."""
        return self.apply_up(self.apply_down(matrix.double()))

    def apply_up(self, up: Float[Tensor, "out k"]) -> Float[Tensor, "out k"]:
        """`L' up`, float64: the left factor of a whitened product."""
        return self.left[:, None] * up.double() if self.left.ndim == 1 else self.left.T @ up.double()

    def apply_down(self, down: Float[Tensor, "k in"]) -> Float[Tensor, "k in"]:
        """`down R`, float64: the right factor of a whitened product."""
        return down.double() * self.right if self.right.ndim == 1 else down.double() @ self.right

    def undo(self, pair: LowRank, dtype: torch.dtype) -> LowRank:
        """The pair whose whitened product this is, in a float dtype."""
        up, down = pair.up.double(), pair.down.double()
        if self.left.ndim == 1:
            up = up / self.left[:, None]
        else:
            up = torch.linalg.solve_triangular(self.left.T, up, upper=True)
        if self.right.ndim == 1:
            down = down / self.right
        else:
            down = torch.linalg.solve_triangular(self.right, down, upper=False, left=False)
        return LowRank(up.to(dtype).contiguous(), down.to(dtype).contiguous())


def _root(moment: Tensor) -> Tensor:
    moment = moment.double()
    if moment.ndim == 1:
        return (moment + _DAMPING * moment.mean()).sqrt()
    damped = moment + _DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    root: Tensor = torch.linalg.cholesky(damped)
    return root
