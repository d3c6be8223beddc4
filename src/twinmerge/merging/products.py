"""Merges that need only the inner products of the models: each tensor becomes a weighted sum of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from twinmerge.merging.method import Chunk, Chunks, Method
from twinmerge.merging.statistics import Statistics


class ByProducts(Method):
    """A method whose weights of a tensor follow from the products of its models, which are added up in stretches.

    It merges task vectors if it starts from a base and there is one, else the models themselves.
    """

    @abstractmethod
    def combination(
        self, gram: Float64[Tensor, "experts experts"], experts: Sequence[str]
    ) -> Float64[Tensor, " experts"]:
        """What each vector is multiplied with.

        Args:
            gram: inner products of the vectors, whole tensors.
            experts: their names, in this order.
        """

    def measure(self, tensor: Chunks, statistics: Statistics) -> Mapping[str, float]:
        """The weights of a tensor, by expert."""
        names: list[str] = []
        gram = torch.zeros((), dtype=torch.float64)
        for chunk in tensor():
            names = chunk.names
            vectors = torch.stack([self._vector(chunk, name).flatten() for name in names])
            gram = gram + vectors @ vectors.T
        return dict(zip(names, self.combination(gram, names).tolist(), strict=True)) if names else {}

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The weighted sum, on the base if task vectors are merged."""
        weights: Mapping[str, float] = statistics.tensor
        merged = torch.zeros_like(self._vector(chunk, chunk.names[0]))
        for name in chunk.names:
            merged.add_(self._vector(chunk, name), alpha=weights[name])
        return merged.add_(chunk.base_value()) if self._from_base(chunk) else merged

    def _from_base(self, chunk: Chunk) -> bool:
        return self.uses_base and chunk.base is not None

    def _vector(self, chunk: Chunk, name: str) -> Float64[Tensor, "..."]:
        return chunk.task_vector(name, torch.float64) if self._from_base(chunk) else chunk.value(name)


def cosines(gram: Float64[Tensor, "experts experts"]) -> Float64[Tensor, "experts experts"]:
    """Of the angles between vectors, from their products; 0 with a vector of zeros."""
    norms = gram.diagonal().sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0.0)
    return (gram * scale * scale[:, None]).clamp(-1, 1)
