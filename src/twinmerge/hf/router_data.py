"""Reads router data through a model: the tokens and the features of rows, computed when they are asked for."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from twinmerge.files.progress import Progress, silent
from twinmerge.files.rows import Row
from twinmerge.hf.batches import DEFAULTS
from twinmerge.hf.inputs import Encoded, batches_of, encode, pad, tokenized_batches
from twinmerge.hf.model import TwinModel
from twinmerge.routing.router import Batch
from twinmerge.routing.tokens import stack_ids
from twinmerge.twin.features import Layers


class EncodedRows(Batch):
    """Rows of text as a router sees them."""

    def __init__(
        self,
        model: TwinModel,
        encoded: Sequence[Encoded],
        progress: Progress = silent,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Take rows; nothing is computed yet.

        Args:
            model: whose hidden states are looked at.
            encoded: the rows' tokens; the rows themselves, if they are images.
            progress: called with ("router features", done, total).
            context: what passes run under, such as another precision.
        """
        self.model, self.encoded, self.progress, self.context = model, encoded, progress, context

    @classmethod
    def of(
        cls,
        model: TwinModel,
        rows: Sequence[Row],
        progress: Progress = silent,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> "EncodedRows":
        """Encode rows of text with the model's tokenizer; images are read when they are looked at."""
        if model.reads_images:
            return cls(model, rows, progress, context)
        return cls(model, encode(model, rows), progress, context)

    @property
    def ids(self) -> Tensor:
        """(row, seq) token ids."""
        return stack_ids([torch.tensor(one["input_ids"]) for one in self.encoded])

    def hidden(self, layers: Layers, gate: Tensor | None = None) -> Tensor:
        """(row, feature), batch by batch of like length."""
        found: list[Tensor] = [torch.empty(0)] * len(self.encoded)
        done = 0
        for chosen, inputs in self._batches():
            with self.context():
                values = self.model.features_as(layers, None if gate is None else gate[chosen], **inputs)
            for index, value in zip(chosen, values.cpu(), strict=True):
                found[index] = value
            done += len(chosen)
            self.progress("router features", done, len(self.encoded))
        return torch.stack(found)

    def _batches(self) -> Iterator[tuple[list[int], dict[str, Any]]]:
        if self.model.reads_images:
            yield from tokenized_batches(self.model, self.encoded)
            return
        for chosen in batches_of(self.model, self.encoded, DEFAULTS.limits):
            yield chosen, pad(self.model, [self.encoded[index] for index in chosen])

    def take(self, rows: Tensor) -> "EncodedRows":
        """Some of the rows."""
        return EncodedRows(self.model, [self.encoded[row] for row in rows.tolist()], self.progress, self.context)
