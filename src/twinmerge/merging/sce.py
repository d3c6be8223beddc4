"""Merges experts by SCE: select by variance, calculate weights from energy, erase minority signs (arXiv:2408.07990)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import torch
from jaxtyping import Bool, Float32
from pydantic import Field
from torch import Tensor

from twinmerge.merging.method import Chunk, Chunks, Method, merge_method
from twinmerge.merging.order import kth_largest
from twinmerge.merging.statistics import Statistics


@dataclass(frozen=True)
class _Found:
    """What must be known of a tensor."""

    smallest: float = 0.0
    """Variance from which on entries are selected; 0 selects all."""
    weights: dict[str, float] = field(default_factory=dict)


@merge_method("sce", paper="arXiv:2408.07990")
class Sce(Method):
    """theta_0 + sum_t w_t tau_t / sum_t w_t over experts with an entry's sign, w_t the energy of selected entries."""

    select_topk: Annotated[float, Field(gt=0, le=1, description="the fraction kept, in (0, 1]")] = 1.0
    """The fraction selected of the entries in which experts differ at all; the paper's is 0.1, 1 selects all."""

    def measure(self, tensor: Chunks, statistics: Statistics) -> _Found:
        """The smallest variance that is selected, and each expert's energy there."""
        smallest = 0.0 if self.select_topk == 1 else self._smallest(tensor)
        energies: dict[str, float] = {}
        for chunk in tensor():
            vectors = _vectors(chunk)
            selected = _selected(vectors, smallest)
            for name, vector in vectors.items():
                energies[name] = energies.get(name, 0.0) + float(vector.double().square().mul_(selected).sum())
        return _Found(smallest, energies)

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The base and the weighted mean of what agrees; an entry whose sum is zero stays the base's."""
        found: _Found = statistics.tensor
        vectors = _vectors(chunk)
        selected = _selected(vectors, found.smallest)
        elected = torch.stack(list(vectors.values())).sum(0).sign().mul_(selected)
        total, divisor = torch.zeros_like(elected, dtype=torch.float64), torch.zeros_like(elected, dtype=torch.float64)
        for name, vector in vectors.items():
            agrees = vector * elected > 0
            total.add_(vector.double().mul_(agrees), alpha=found.weights[name])
            divisor.add_(agrees, alpha=found.weights[name])
        return total.div_(divisor.masked_fill_(divisor == 0, 1.0)).add_(chunk.base_value())

    def _smallest(self, tensor: Chunks) -> float:
        def variances() -> Iterator[tuple[str, Float32[Tensor, " entries"]]]:
            for chunk in tensor():
                found = _variance(_vectors(chunk))
                yield "", found[found > 0]

        counts = sum(len(found) for _, found in variances())
        kept = int(self.select_topk * counts)
        return kth_largest(variances, lambda _, numel: kept)[""] if kept else float("inf")


def _vectors(chunk: Chunk) -> dict[str, Float32[Tensor, "..."]]:
    return {name: chunk.task_vector(name) for name in chunk.names}


def _variance(vectors: dict[str, Float32[Tensor, "..."]]) -> Float32[Tensor, "..."]:
    """Of each entry over experts, added up in their order."""
    found = list(vectors.values())
    mean = torch.zeros_like(found[0])
    for vector in found:
        mean.add_(vector)
    mean.div_(len(found))
    spread = torch.zeros_like(mean)
    for vector in found:
        spread.add_((vector - mean).square_())
    return spread.div_(len(found))


def _selected(vectors: dict[str, Float32[Tensor, "..."]], smallest: float) -> Bool[Tensor, "..."]:
    """Entries that vary enough; all of them where nothing is asked for."""
    if not smallest:
        return torch.ones_like(next(iter(vectors.values())), dtype=torch.bool)
    return _variance(vectors) >= smallest
