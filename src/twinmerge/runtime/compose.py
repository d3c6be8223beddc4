"""Rebuilds weights for one gate, the dense reference: shared + sum over experts of gate * exclusive (METHOD §5)."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from twinmerge.tensors.parts import Part


def theta(
    shared: Mapping[str, Tensor], exclusive: Sequence[Mapping[str, Part]], gate: Sequence[float] | Tensor
) -> dict[str, Tensor]:
    """Rebuild all weights for one gate.

    Args:
        shared: parameter name -> the shared expert's tensor.
        exclusive: for every expert in the gate's order, parameter name -> exclusive part.
        gate: (expert,), one weight per expert.

    Returns:
        Parameter name -> tensor, in the shared expert's dtype; summed in float32, or in float64 for float64 weights.
    """
    weights = {}
    for name, tensor in shared.items():
        active = [(float(w), parts[name]) for w, parts in zip(gate, exclusive, strict=True) if name in parts and w]
        if not active:
            weights[name] = tensor
            continue
        total = tensor if tensor.itemsize == 8 else tensor.float()
        for weight, part in active:
            total = total + weight * part.dense().reshape(tensor.shape).to(total.dtype)
        weights[name] = total.to(tensor.dtype)
    return weights
