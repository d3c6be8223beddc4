"""Says what each parameter of a transformers model is, from its class."""

from pathlib import Path

from torch import nn
from transformers.pytorch_utils import Conv1D

from twinmerge.hf.loading import without_weights
from twinmerge.twin.plan import Kind


def layer_kind(module: nn.Module, leaf: str) -> Kind:
    """What a gated layer does with a layer's parameter; `static` where no gated layer exists."""
    known = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.LayerNorm)
    if any(isinstance(module, cls) and type(module).forward is not cls.forward for cls in known):
        return "static"  # a subclass that computes something else
    if isinstance(module, nn.Linear):
        return "linear" if leaf == "weight" else "vector"
    if isinstance(module, Conv1D):
        return "conv1d" if leaf == "weight" else "vector"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode == "zeros" and module.padding != "same":
        if leaf != "weight":
            return "vector"
        return "conv" if module.groups == 1 else "grouped_conv"
    norm = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
    weight = getattr(module, "weight", None)
    return "vector" if norm and weight is not None and weight.ndim == 1 else "static"


def parameter_kinds(folder: Path) -> dict[str, Kind]:
    """What every tensor of a model folder is, from its class; no weight is read.

    Returns:
        Tensor name -> kind; buffers are `static`.

    Raises:
        MismatchError: if the folder's class is unknown to transformers.
    """
    model = without_weights(folder)
    kinds: dict[str, Kind] = dict.fromkeys(model.state_dict(), "static")
    for module_name, module in model.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            kinds[f"{module_name}.{leaf}" if module_name else leaf] = layer_kind(module, leaf)
    return kinds
