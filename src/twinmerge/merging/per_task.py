"""What systems have in common that make a model for each task out of the merged one: the task's name picks weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable
from typing import ClassVar

from torch import Tensor

from twinmerge.files.checkpoint import TensorSpec
from twinmerge.merging.method import Chunk, Knowledge, Method, Use
from twinmerge.merging.statistics import Statistics


class PerTask(Method):
    """A method whose result is the model of one task; together the tasks' models take less than the experts."""

    protocol: ClassVar[Knowledge] = "B"
    uses: ClassVar[tuple[Use, ...]] = ("merge", "contestant")
    task: str = ""
    """The expert whose model is made."""

    def misfit(self, experts: Collection[str]) -> str | None:
        """Also no expert, or one that is none of these."""
        if self.task in experts:
            return super().misfit(experts)
        found = f"found {self.task!r}" if self.task else "found none"
        return f"task must name the expert whose model is made, one of {', '.join(sorted(experts))}; {found}"

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        """The task's model: the base where its expert has none of this parameter; the first expert's, unnamed."""
        name = self.task or chunk.names[0]
        return chunk.base_value() if name not in chunk.names else self.change(chunk, name, statistics)

    @abstractmethod
    def change(self, chunk: Chunk, name: str, statistics: Statistics) -> Tensor:
        """The model of an expert that has this parameter, float64."""

    @abstractmethod
    def stored_bytes(self, specs: Iterable[TensorSpec], experts: int) -> dict[str, int]:
        """What the paper's storage takes: `shared`, as much as one model, and `exclusive`, all that is kept beside it.

        Args:
            specs: the tensors of the model.
            experts: how many tasks there are.
        """


def masked_bytes(specs: Iterable[TensorSpec], experts: int, *, numbers: int = 0) -> dict[str, int]:
    """The base; beside it one vector of all tasks, and of each a bit for every entry and some numbers of float32."""
    floats = [spec for spec in specs if spec.dtype.is_floating_point]
    bits, base = -(-sum(spec.numel for spec in floats) // 8), sum(spec.nbytes for spec in floats)
    return {"shared": base, "exclusive": base + experts * (bits + 4 * numbers)}
