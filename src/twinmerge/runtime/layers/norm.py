"""Gates norms: LayerNorm, RMSNorm of any class, and BatchNorm with its statistics."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twinmerge.runtime.gate import GateContext, GateSlot
from twinmerge.runtime.layers.layer import GatedLayer, computes, per_row, samples, simple, untouched
from twinmerge.tensors.parts import Part
from twinmerge.twin.plan import Kind


class GatedNorm(GatedLayer):
    """LayerNorm and RMSNorm of any model: gamma(x) = gamma_s + sum gate * dgamma, likewise beta."""

    kind: ClassVar[Kind] = "vector"

    def __init__(
        self, shared: nn.Module, parts: Mapping[str, Mapping[int, Part]], experts: int, slot: GateSlot, name: str = ""
    ) -> None:
        """Wrap a norm and find out what it computes."""
        super().__init__(shared, parts, experts, slot, name)
        self.formula = _formula(shared) or _Formula()

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Modules of any class that compute a norm over the last axis."""
        return _formula(module) is not None

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ..., size) -> the same shape."""
        context = self.slot.context
        if context is None:
            y: Tensor = self.shared(x)
            return y
        gamma, beta = self.vector("weight", context), self.vector("bias", context)
        if isinstance(self.shared, nn.LayerNorm) and len(context.gate) == 1:
            return F.layer_norm(x, self.shared.normalized_shape, gamma, beta, self.shared.eps)
        normalised = self.formula.normalise(self.shared, x)
        rows = context.split(normalised)
        scale: Any = gamma
        if self.formula.product == "wide":
            scale = scale.to(rows.dtype)
        scale = scale + self.formula.offset if self.formula.offset else scale
        if beta is None:
            return rows.mul_(scale).view(x.shape).to(x.dtype)
        fits = rows.dtype == beta.dtype  # not under autocast
        rows = torch.addcmul(beta, rows, scale, out=rows) if fits else torch.addcmul(beta, rows, scale)
        return rows.view(x.shape)


Way = Literal["narrow", "mixed", "wide"]


@dataclass(frozen=True)
class _Formula:
    """How a norm of some class computes."""

    centred: bool = False
    """Whether the mean is taken away."""
    offset: float = 0.0
    """Added to the weight: 1 where Gemma does."""
    product: Way = "narrow"
    """Where it goes back from float32 to the input's dtype: once normalised, with its last factor, or at its end."""

    def normalise(self, module: Any, x: Tensor) -> Tensor:
        """A norm without its affine part."""
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, tuple(module.weight.shape), None, None, module.eps)
        if isinstance(module, nn.RMSNorm):
            return F.rms_norm(x, tuple(module.weight.shape), None, module.eps)
        wide = x.float()  # by hand: torch's own takes three times as long for a token
        if self.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm_epsilon(module))
        if self.product == "wide":
            return wide * scale
        return ((x if self.product == "mixed" else wide) * scale).to(x.dtype)

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        """The whole norm."""
        normalised = self.normalise(module, x)
        found: Tensor = normalised * (module.weight.to(normalised.dtype) + self.offset)
        beta = getattr(module, "bias", None)
        return found.to(x.dtype) if beta is None else (found + beta).to(x.dtype)


def _formula(module: Any) -> _Formula | None:
    """What a norm computes, None if it is no norm of a known form."""
    if untouched(module, nn.LayerNorm):
        return _Formula(centred=True) if module.weight is not None and module.weight.ndim == 1 else None
    if not simple(module, 1):
        return None
    biased = getattr(module, "bias", None) is not None
    inputs = [x + shift for shift in (0, 1) for x in samples(len(module.weight), module.weight)]
    ways: tuple[Way, ...] = ("narrow", "mixed", "wide")
    forms = [_Formula(*form) for form in product((False, True), (0.0, 1.0), ways)]
    for precision in (0.0, torch.finfo(torch.float32).eps):
        for form in forms:
            if (form.centred and form.product == "mixed") or (biased and form.product == "wide"):
                continue
            told = bool((module.weight + form.offset).any())  # zeros would hide the difference
            if told and computes(module, partial(form, module), inputs, precision):
                return form
    return None


def norm_epsilon(layer: nn.Module) -> float:
    """The epsilon of a norm, whatever its class calls it."""
    return float(getattr(layer, "variance_epsilon", getattr(layer, "eps", None) or 1e-6))


_OF_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


class GatedBatchNorm(GatedLayer):
    """BatchNorm as it answers: weight, bias and both statistics under the gate, a scale and shift a row and channel."""

    kind: ClassVar[Kind] = "vector"
    leaves = frozenset(_OF_BATCH_NORM)

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Torch's, with weights and statistics of its own."""
        known = untouched(module, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        return known and module.weight is not None and module.running_mean is not None and not module.training

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channel, ...) -> the same shape."""
        context = self.slot.context
        if context is None:
            y: Tensor = self.shared(x)
            return y
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias, mean, variance = (self._wide(leaf, context, wide) for leaf in _OF_BATCH_NORM)
        scale = weight * torch.rsqrt(variance + self.shared.eps)
        shape = -1, x.shape[1], *(1,) * (x.ndim - 2)
        repeats = context.repeats(len(x))
        shift, scale = (per_row(v, repeats).reshape(shape) for v in (bias - mean * scale, scale))
        return torch.addcmul(shift, x.to(wide), scale).to(x.dtype)

    def _wide(self, leaf: str, context: GateContext, dtype: torch.dtype) -> Tensor:
        value: Any = self.vector(leaf, context)
        found: Tensor = value.to(dtype)
        return found
