"""Gates convolutions, plain and grouped."""

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from twinmerge.runtime.layers.layer import GatedLayer, per_row, untouched
from twinmerge.twin.plan import Kind


class GatedConv(GatedLayer):
    """nn.Conv1d and nn.Conv2d without groups: the downs are a convolution, the ups a 1x1 convolution."""

    kind: ClassVar[Kind] = "conv"

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Torch's, padded with zeros."""
        return _padded_with_zeros(module) and module.groups == 1

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, ...) -> (batch, out, ...)."""
        y: Tensor = self.shared(x)
        context = self.slot.context
        if context is None:
            return y
        convolve = F.conv2d if x.ndim == 4 else F.conv1d
        layer = self.shared
        spread = (1,) * (x.ndim - 2)
        repeats = context.repeats(len(x))
        picked = context.picked("all", (self.ranks,), x.dtype) if self.has_factors else None
        if picked is not None and picked.gate.shape[2]:
            down = context.take(self.projection.down, "all", picked, 0).reshape(-1, *layer.weight.shape[1:])
            up = context.take(self.up, "all", picked, 0).T
            hidden = convolve(x, down, None, layer.stride, layer.padding, layer.dilation)
            hidden *= picked.gate.repeat_interleave(repeats, dim=0).reshape(len(x), -1, *spread)
            y += convolve(hidden, up.reshape(*up.shape, *spread))
        for index, matrix in self.used_sparse(context):
            gate = context.rows(len(x))[:, index].to(x.dtype).reshape(-1, 1, *spread)
            weight = matrix.to_dense().reshape(layer.weight.shape)
            y += gate * convolve(x, weight, None, layer.stride, layer.padding, layer.dilation)
        if "bias" in self.places:
            y += (per_row(self.vector("bias", context), repeats) - layer.bias).reshape(-1, y.shape[1], *spread)
        return y


class GatedGroupedConv(GatedLayer):
    """Grouped (depthwise) convolutions: small weights, so each input gets its own, all in one grouped convolution."""

    kind: ClassVar[Kind] = "grouped_conv"

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Torch's, padded with zeros."""
        return _padded_with_zeros(module) and module.groups > 1

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, ...) -> (batch, out, ...)."""
        context = self.slot.context
        layer = self.shared
        if context is None:
            shared: Tensor = layer(x)
            return shared
        batch, weight = len(x), layer.weight
        gate = context.rows(batch).to(x.dtype)
        repeats = context.repeats(batch)
        weights = weight.expand(batch, *weight.shape)
        if self.has_factors:
            picked = context.picked("all", (self.ranks,), x.dtype)
            up, down = (context.take(f, "all", picked, 0) for f in (self.up, self.projection.down))
            differences = (up.T * picked.gate) @ down
            weights = weights + differences.repeat_interleave(repeats, dim=0).reshape(weights.shape)
        for index, matrix in self.used_sparse(context):
            difference = matrix.to_dense().reshape(weight.shape)
            weights = weights + gate[:, index].reshape(-1, *(1,) * weight.ndim) * difference
        convolve = F.conv2d if x.ndim == 4 else F.conv1d
        packed, filters = x.reshape(1, -1, *x.shape[2:]), weights.reshape(-1, *weight.shape[1:])
        y = convolve(packed, filters, None, layer.stride, layer.padding, layer.dilation, layer.groups * batch)
        y = y.reshape(batch, -1, *y.shape[2:])
        if layer.bias is not None:
            bias = per_row(self.vector("bias", context), repeats)
            y += bias.reshape(-1, y.shape[1], *(1,) * (y.ndim - 2))
        return y


def _padded_with_zeros(module: Any) -> bool:
    return untouched(module, nn.Conv1d, nn.Conv2d) and module.padding_mode == "zeros"
