"""Knows how rows are answered: by whom, and which of them share a batch; imports nothing heavy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from twinmerge.errors import InputError


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
class Writing:
    """How texts are written; what is None is as each expert's generation config says.

    Attributes:
        num_beams: of a beam search, 1 or more.
        temperature: of sampling, above 0; 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that hold this probability, (0, 1].
        top_k: sample from so many of the likeliest tokens.
        seed: of sampling; the same rows in the same order get the same texts.
        stop: strings before which a text ends, beside what ends those of the expert.

    Raises:
        InputError: if a value is none of these.
    """

    num_beams: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        holds = {
            "num_beams must be 1 or more": self.num_beams is None or self.num_beams >= 1,
            "temperature must be a finite number, 0 or more": self.temperature is None
            or 0 <= self.temperature < float("inf"),
            "top_p must be above 0, at most 1": self.top_p is None or 0 < self.top_p <= 1,
            "top_k must be 1 or more": self.top_k is None or self.top_k >= 1,
            "seed must be 0 or more": self.seed >= 0,
            "stop must be strings of at least one character": all(self.stop) and not isinstance(self.stop, str),
        }
        if broken := next((rule for rule, kept in holds.items() if not kept), None):
            raise InputError(f"{broken}, found {getattr(self, broken.split()[0])!r}")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn, which one of the settings of sampling asks for."""
        drawn = (self.temperature, self.top_p, self.top_k)
        return self.temperature != 0 and any(value is not None for value in drawn)

    @property
    def asked(self) -> dict[str, Any]:
        """As arguments of transformers' generate."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k} if self.samples else {}
        said = {"num_beams": self.num_beams, **drawn, "stop_strings": list(self.stop) or None}
        return {"do_sample": self.samples} | {name: value for name, value in said.items() if value is not None}


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
        writing: how texts are written.
    """

    expert: str | None = None
    limits: BatchLimits = BatchLimits()
    max_new_tokens: int = 64
    uncertain_below: float | None = None
    leave_out: bool = False
    skip_unreadable: bool = False
    precision: Literal["auto", "float32", "bfloat16"] | None = None
    gate: Mapping[str, float] | None = None
    writing: Writing = Writing()

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
