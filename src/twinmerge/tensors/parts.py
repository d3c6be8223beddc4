"""What an expert keeps of one parameter beyond the shared expert: factors, single entries, or the whole difference.

What handles exclusive knowledge (compression, files, gated layers, exports) takes a `Part` and asks it; another form
is a class with these methods and a line in `FORMS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from twinmerge.tensors.float8 import EIGHT_BITS, Quantised
from twinmerge.tensors.int4 import FourBits
from twinmerge.tensors.low_rank import LowRank
from twinmerge.tensors.sparse import Sparse


@runtime_checkable
class Part(Protocol):
    """A difference, expert minus shared expert, of one parameter in some form."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in*kh*kw) of a matrix, the parameter's own where it is kept whole."""

    @property
    def dtype(self) -> torch.dtype:
        """What its numbers are stored in."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""

    def energy(self) -> float:
        """Its squared Frobenius norm."""

    def dense(self) -> Tensor:
        """The difference itself."""

    def to(self, dtype: torch.dtype) -> Part:
        """The same in another float dtype."""

    def pack(self) -> dict[str, Tensor]:
        """Its tensors, as files hold them."""


@dataclass(frozen=True)
class Dense:
    """The whole difference: of 1-D parameters, which are small."""

    values: Float[Tensor, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's."""
        return tuple(self.values.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.values.nbytes

    def energy(self) -> float:
        """Squared norm."""
        return float(self.values.double().square().sum())

    def dense(self) -> Float[Tensor, "..."]:
        """The values."""
        return self.values

    def to(self, dtype: torch.dtype) -> Dense:
        """The same values in another float dtype."""
        return Dense(self.values.to(dtype))

    def pack(self) -> dict[str, Tensor]:
        """`dense`."""
        return {"dense": self.values}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Dense:
        """What `pack` gave."""
        return cls(tensors["dense"])


AnyForm = TypeVar("AnyForm", LowRank, Sparse, Dense)
Key = TypeVar("Key")
FORMS: Mapping[frozenset[str], type[LowRank | FourBits | Sparse | Dense]] = {
    frozenset({"up", "down"}): LowRank,
    frozenset({"four_bits"}): FourBits,
    frozenset({"indices", "values"}): Sparse,
    frozenset({"dense"}): Dense,
}
"""Names of a form's tensors -> the form."""
STORED_ONLY = (Quantised, FourBits)
"""Forms for the disk, which `to` a float dtype turns into the pairs that are computed with."""
LEAVES = tuple(sorted(leaf for leaves in FORMS for leaf in leaves))


def unpack(tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Part:
    """The part that `pack` gave as tensors.

    Args:
        tensors: by the names of one form.
        shape: of the parameter as a matrix.

    Example:
        >>> unpack({"dense": torch.ones(3)}, (3, 1)).energy()
        3.0
    """
    eight_bits = any(tensor.dtype == EIGHT_BITS for tensor in tensors.values())
    return (Quantised if eight_bits else FORMS[frozenset(tensors)]).unpack(tensors, shape)


def of_form(parts: Mapping[Key, Part], form: type[AnyForm]) -> dict[Key, AnyForm]:
    """Those of some parts that have one form."""
    return {key: part for key, part in parts.items() if isinstance(part, form)}
