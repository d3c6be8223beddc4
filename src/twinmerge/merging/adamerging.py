"""Merges with coefficients that make the merged model sure of unlabelled inputs (AdaMerging, arXiv:2310.02575)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from jaxtyping import Float32
from pydantic import Field
from torch import Tensor

from twinmerge.merging.method import Calibrated, Chunk, Chunks, Fraction, merge_method
from twinmerge.merging.statistics import Statistics
from twinmerge.merging.ties import thresholds

ENTROPY = "entropy"
"""The measurement that learns the coefficients: of each expert, one number for each parameter by its name."""


@merge_method("adamerging", paper="arXiv:2310.02575")
class AdaMerging(Calibrated):
    """theta_0 + sum l_t tau_t, l in [0, 1] learned for each expert, or each expert and parameter, by least entropy."""

    measurement = ENTROPY
    data = "unlabelled inputs of each expert, on which coefficients are learned"
    granularity: Literal["task", "layer"] = "layer"
    """One coefficient for an expert, or one for each of its parameters."""
    trimmed: bool = False
    """Whether task vectors are trimmed and those that agree on each entry's sign kept, as TIES does (AdaMerging++)."""
    density: Fraction = 0.2
    """What trimming keeps of a task vector."""
    start: Annotated[float, Field(ge=0, le=1, description="in [0, 1]")] = 0.3
    """Of all coefficients, before the first step."""
    steps: Annotated[int, Field(ge=0)] = 500
    """Each adds up the mean entropy of two batches of every expert."""
    batch: Annotated[int, Field(ge=1)] = 16
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    """Of Adam."""

    def prepass(self, model: Chunks) -> Mapping[str, float]:
        """The smallest magnitude that trimming keeps, by expert; none where nothing is trimmed."""
        return thresholds(model, self.density) if self.trimmed else {}

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The base and the task vectors; what nothing was learned of, as statistics of BatchNorm, is averaged."""
        vectors = {name: chunk.task_vector(name) for name in chunk.names}
        vectors = agreeing(vectors, statistics.model) if self.trimmed else vectors
        merged = chunk.base_value()
        for name in chunk.names:
            found = statistics.read(name, chunk.tensor)
            share = 1 / len(vectors) if found is None else float(found)
            merged.add_(vectors[name].double(), alpha=share)
        return merged


def agreeing(
    vectors: Mapping[str, Float32[Tensor, "*shape"]], smallest: Mapping[str, float]
) -> dict[str, Float32[Tensor, "*shape"]]:
    """Task vectors with what is small, and what has not the sign of their sum, left out.

    Args:
        vectors: by expert; they are changed.
        smallest: the smallest magnitude that is kept of each; without one all is.
    """
    for name, vector in vectors.items():
        vector.mul_(vector.abs() >= smallest.get(name, 0.0))
    elected = torch.stack([vectors[name] for name in sorted(vectors)]).sum(dim=0).sign_()
    return {name: vector.mul_(vector * elected > 0) for name, vector in vectors.items()}
