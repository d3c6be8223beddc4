"""Arithmetic and checks on the tensors of two state dicts."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from twinmerge.errors import CheckpointError, MismatchError


def task_vector(base: Float[Tensor, "..."], expert: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """What fine-tuning changed: expert - base (METHOD §2, arXiv:2212.04089).

    Args:
        base: a parameter of the base model, any float dtype.
        expert: the same parameter of the expert, any float dtype.

    Returns:
        The difference in float32; in float64 if either is float64.

    Raises:
        MismatchError: if the shapes differ.
    """
    if base.shape != expert.shape:
        raise MismatchError(
            f"shape {tuple(expert.shape)} in the expert, {tuple(base.shape)} in the base; "
            "was it fine-tuned from the same base?"
        )
    wide = torch.float64 if torch.float64 in (base.dtype, expert.dtype) else torch.float32
    return expert.to(wide) - base.to(wide)


def require_finite(tensor: Shaped[Tensor, "..."], where: str) -> None:
    """Refuse NaN and Inf, which merging would spread over every expert.

    Args:
        tensor: any shape and dtype.
        where: how to call the tensor in the message, such as `expert 'sms', 'encoder.weight'`.

    Raises:
        CheckpointError: with how many there are and the index of the first.
    """
    readable = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # float8 has no isfinite
    finite = readable.isfinite()
    if not finite.all():
        wrong = (~finite).nonzero()
        raise CheckpointError(f"{where} has {len(wrong)} NaN or Inf values, first at index {tuple(wrong[0].tolist())}")
