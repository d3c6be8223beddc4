"""Knows how rows are answered: by whom, and which of them share a batch; imports nothing heavy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class BatchLimits:
    """What one batch may hold.

    Attributes:
        rows: inputs, at most.
        tokens: rows times the longest one's tokens, padding included, at most; a longer input is a batch of its own.
    """

    rows: int = 64
    tokens: int = 4096


@dataclass(frozen=True)
class PredictSettings:
    """How rows are answered.

    Attributes:
        expert: use this expert alone, not the router.
        limits: of a batch.
        max_new_tokens: of a causal LM's continuation.
        uncertain_below: answers say whether they are `uncertain`: the router's confidence is below this, [0, 1].
        leave_out: those that are get no answer at all.
        skip_unreadable: rows whose images cannot be read get an `error` instead of an answer.
        precision: of matrix products, `auto` being the faster of both on this machine; None is no less precise than
            the weights are stored.
        gate: expert -> weight, of every row, instead of the router's; others are 0. The head is that of `expert`, else
            of the largest weight.
    """

    expert: str | None = None
    limits: BatchLimits = BatchLimits()
    max_new_tokens: int = 64
    uncertain_below: float | None = None
    leave_out: bool = False
    skip_unreadable: bool = False
    precision: Literal["auto", "float32", "bfloat16"] | None = None
    gate: Mapping[str, float] | None = None

    @property
    def owner(self) -> str | None:
        """Whose head answers every row; None where the router says."""
        if self.expert is not None or self.gate is None:
            return self.expert
        return max(sorted(self.gate), key=lambda name: (self.gate or {})[name], default=None)


DEFAULTS = PredictSettings()


def batches(lengths: Sequence[int], limits: BatchLimits) -> list[list[int]]:
    """Inputs in batches of like length, longest first.

    Args:
        lengths: tokens of every input.
        limits: what a batch may hold.

    Returns:
        Indices of `lengths`, each once.

    Example:
        >>> batches([3, 9, 4, 2], BatchLimits(rows=2, tokens=10))
        [[1], [2, 0], [3]]
    """
    found: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if found and len(found[-1]) < limits.rows and (len(found[-1]) + 1) * longest <= limits.tokens:
            found[-1].append(index)
        else:
            found.append([index])
            longest = lengths[index]
    return found
