"""Holds what is known of the models before a tensor is merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Statistics:
    """What a method finds before it merges; picklable, so that workers get it too."""

    model: Any = None
    """What its pre-pass over the whole model found."""
    tensor: Any = None
    """What it measured of the tensor that is merged."""
