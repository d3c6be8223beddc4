"""Holds what is known of the models before a tensor is merged: what a pre-pass found, what was measured on data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from twinmerge.files.checkpoint import Checkpoint


@dataclass(frozen=True)
class Statistics:
    """What a method has to go by; picklable, so that workers get it too."""

    model: Any = None
    """What its pre-pass over the whole model found."""
    tensor: Any = None
    """What it measured of the tensor that is merged."""
    data: Mapping[str, Checkpoint] = field(default_factory=dict)
    """What was measured of each expert on calibration data: tensors by the names that the measurement gives them."""

    def read(self, expert: str, name: str, start: int = 0, stop: int | None = None) -> Tensor | None:
        """A measured tensor, or a stretch of it, flattened; None if there is none of that name.

        Raises:
            ValueError: if nothing was measured of the expert.
        """
        if expert not in self.data:
            raise ValueError(f"nothing was measured of expert {expert!r}, which its merge method needs")
        found = self.data[expert]
        if name not in found.specs:
            return None
        return found.read(name) if stop is None else found.read_flat(name, start, stop)
