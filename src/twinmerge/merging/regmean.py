"""Merges experts by RegMean (arXiv:2212.09849): each linear layer by least squares over the inputs that it has seen."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.merging.method import CalibratedMean, Chunk, merge_method
from twinmerge.merging.spectra import is_layer
from twinmerge.merging.statistics import Statistics

BY_COLUMN, BY_ROW = "/inputs by column", "/inputs by row"
"""What follows a weight's name where its inputs' Gram matrix is measured: its columns, or its rows, take the inputs."""
_RIDGE = 1e-6
"""Of the mean diagonal, added to each Gram matrix: what no input excites is averaged."""
_TIMES = 6
"""No layer's outputs are so many times its inputs, or the other way round, but over a vocabulary."""


@merge_method("regmean", paper="arXiv:2212.09849")
class RegMean(CalibratedMean):
    """(sum_t w_t G_t)^-1 sum_t w_t G_t W_t with W_t (in, out) and G_t = X_t' X_t; all but linear layers is averaged."""

    measurement = "grams"
    uses_base = False
    whole = True
    alpha: Annotated[float, Field(ge=0, le=1, description="in [0, 1]")] = 0.9
    """What entries off the diagonal of G are multiplied with."""

    def takes_whole(self, tensor: str, shape: tuple[int, ...]) -> bool:
        """Matrices, by their names no embeddings."""
        return is_layer(tensor, shape)

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The layer whose outputs are nearest to those of all experts."""
        weights = self.weights(chunk.names)
        values = {expert: chunk.value(expert) for expert in chunk.names}
        for ending in (BY_COLUMN, BY_ROW):
            read = {expert: statistics.read(expert, chunk.tensor + ending) for expert in chunk.names}
            grams = {expert: self._shrunk(gram) for expert, gram in read.items() if gram is not None}
            if grams and len(grams) < len(read):
                raise ValueError(f"{chunk.tensor!r}: inputs were measured of some experts only, {sorted(grams)}")
            if grams:
                turned = {e: value.T if ending == BY_COLUMN else value for e, value in values.items()}
                merged = _least_squares(grams, turned, weights)
                return merged.T if ending == BY_COLUMN else merged
        merged, total = torch.zeros(()), sum(weights.values())
        for expert, weight in weights.items():
            merged = merged + values[expert] * (weight / total)
        return merged

    def memory_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        """Gram matrices in float64, some of them twice, of the longer side: either may take the inputs.

        One that is many times longer is the vocabulary's, of an output layer, which takes none.
        """
        short, long = sorted(shape)
        return 8 * (long if long <= _TIMES * short else short) ** 2 * (experts + 4)

    def _shrunk(self, gram: Tensor) -> Tensor:
        wide = gram.double()
        return wide.mul(self.alpha).diagonal_scatter(wide.diagonal())


def _least_squares(grams: dict[str, Tensor], values: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The (in, out) matrix with the least sum of squared distances to all, by their inputs."""
    mean = torch.stack([gram.diagonal().mean() for gram in grams.values()]).mean()
    ridge = _RIDGE * float(mean) or 1.0
    total, product = torch.zeros(()), torch.zeros(())
    for expert, gram in grams.items():
        damped = weights[expert] * (gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
        total, product = total + damped, product + damped @ values[expert]
    solved: Tensor = torch.linalg.solve(total, product)
    return solved
