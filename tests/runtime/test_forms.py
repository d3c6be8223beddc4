"""Which layers have a fast gated form, and which only look as if they had."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from tests.runtime.test_layers import EXPERTS, Parts, gated, gates, run
from twinmerge.runtime.compose import theta
from twinmerge.runtime.layers import (
    GatedBatchNorm,
    GatedConv,
    GatedConv1D,
    GatedEmbedding,
    GatedLayer,
    GatedLinear,
    GatedNorm,
    form_of,
)
from twinmerge.tensors.low_rank import LowRank
from twinmerge.tensors.parts import Dense

# ---- which layers can be gated


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 4


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class OddRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x.abs()


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class ByHand(nn.Linear):
    """Falcon's: the same sums, written out."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Clipped(nn.Linear):
    """Linear for small numbers only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-5, 5))


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(6) + 0.5), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


@pytest.mark.parametrize(
    ("module", "form"),
    [
        (ByHand(3, 4), GatedLinear),
        (Doubled(3, 4), None),
        (Clipped(3, 4), None),
        (Conv1D(3, 2), GatedConv1D),
        (Scaled(9, 4), GatedEmbedding),
        (nn.Embedding(9, 4, max_norm=1.0), None),
        (Centred(), GatedNorm),
        (nn.RMSNorm(6), GatedNorm),
        (nn.GroupNorm(2, 6), None),
        (OddRMSNorm(), None),
        (ChannelsFirst(6), None),
        (nn.LayerNorm((2, 2)), None),
        (nn.BatchNorm2d(3).eval(), GatedBatchNorm),
        (nn.BatchNorm2d(3), None),
        (nn.BatchNorm2d(3, track_running_stats=False).eval(), None),
        (nn.Conv2d(2, 2, 3, padding="same"), GatedConv),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), None),
        (nn.ConvTranspose2d(2, 2, 3), None),
        (nn.MultiheadAttention(4, 2), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_form_is_what_a_layer_computes_whatever_its_class(
    module: nn.Module, form: type[GatedLayer] | None, dtype: torch.dtype
) -> None:
    assert form_of(module.to(dtype)) is form


def test_weights_that_do_not_tell_which_way_they_are_stored_have_no_form() -> None:
    module = ByHand(3, 3)
    nn.init.eye_(module.weight)
    assert form_of(module) is None


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (ByHand(3, 4), torch.randn(4, 5, 3)),
        (Scaled(9, 4), torch.randint(0, 9, (4, 5))),
        (Centred(), torch.randn(4, 5, 6)),
        (nn.RMSNorm(6), torch.randn(4, 5, 6)),
        (nn.BatchNorm1d(3), torch.randn(4, 3)),
        (nn.BatchNorm2d(3), torch.randn(4, 3, 2, 2)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
@pytest.mark.parametrize("same", [False, True])
def test_layers_of_other_classes_are_their_weights_row_by_row(module: nn.Module, x: Tensor, same: bool) -> None:
    torch.manual_seed(0)
    module = module.double().eval()
    tensors = dict(module.named_parameters()) | {n: b for n, b in module.named_buffers() if b.is_floating_point()}
    parts: Parts = [
        {
            name: Dense(torch.rand_like(value))
            if value.ndim == 1
            else LowRank(torch.randn(len(value), 2).double(), torch.randn(2, value.shape[1]).double())
            for name, value in tensors.items()
        }
        for _ in range(EXPERTS)
    ]
    x, gate = x.double() if x.is_floating_point() else x, gates(4)[[0, 0, 0, 0] if same else [0, 1, 2, 3]]
    with torch.no_grad():
        rows = [functional_call(module, theta(tensors, parts, g), (r[None],)) for r, g in zip(x, gate, strict=True)]
    assert torch.allclose(run(gated(module, parts), x, gate), torch.cat(rows), atol=1e-10)
    assert torch.equal(run(gated(module, parts), x, None), module(x))
