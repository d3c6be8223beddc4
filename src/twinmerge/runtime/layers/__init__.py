"""The layers that have a fast exact gated form, one kind a file."""

from torch import nn

from twinmerge.runtime.layers.conv import GatedConv, GatedGroupedConv
from twinmerge.runtime.layers.embedding import GatedEmbedding
from twinmerge.runtime.layers.layer import GatedLayer
from twinmerge.runtime.layers.linear import GatedConv1D, GatedLinear
from twinmerge.runtime.layers.norm import GatedBatchNorm, GatedNorm

__all__ = [
    "FORMS",
    "GatedBatchNorm",
    "GatedConv",
    "GatedConv1D",
    "GatedEmbedding",
    "GatedGroupedConv",
    "GatedLayer",
    "GatedLinear",
    "GatedNorm",
    "form_of",
]

FORMS: tuple[type[GatedLayer], ...] = (
    GatedLinear,
    GatedConv1D,
    GatedEmbedding,
    GatedConv,
    GatedGroupedConv,
    GatedBatchNorm,
    GatedNorm,
)


def form_of(module: nn.Module) -> type[GatedLayer] | None:
    """The gated form of a layer, None where there is none."""
    return next((form for form in FORMS if form.fits(module)), None)
