"""Builds models of other models' layers, as mergekit's slices say; from headers, nothing is copied."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from twinmerge.errors import MismatchError
from twinmerge.files.checkpoint import Checkpoint

IN_STACK = re.compile(r"(?:(.*?)\.)?(\d+)\.")
"""A tensor's name up to its first number: the stack that its layer lies in, and which layer that is."""
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What configs call the number of layers."""
_BEFORE = ("embed", "wte", "wpe")
"""What is in names of tensors that come before the layers; all others outside of them come after."""


@dataclass(frozen=True)
class Piece:
    """Some layers of a model, in one stretch of the result."""

    model: str
    """As the recipe calls it."""
    path: Path
    start: int
    stop: int

    @property
    def count(self) -> int:
        """Layers of the result."""
        return self.stop - self.start


def layer_of(name: str) -> int | None:
    """Which layer a tensor belongs to, None outside of layers."""
    found = IN_STACK.match(name)
    return int(found[2]) if found else None


def layer_count(names: Iterable[str]) -> int:
    """Layers of the largest stack."""
    return max((layer + 1 for name in names if (layer := layer_of(name)) is not None), default=0)


def comes_first(name: str) -> bool:
    """Whether a tensor outside of the layers is used before them, by its name."""
    return any(word in part for part in name.split(".") for word in _BEFORE)


def assemble(pieces: Sequence[Piece], models: Mapping[Path, Checkpoint]) -> Checkpoint:
    """A model of pieces, one after the other, layers numbered anew.

    What lies outside of the layers is the first piece's where it comes before them (embeddings), else the last piece's.

    Args:
        pieces: from the first layer to the last.
        models: opened, by path.

    Raises:
        MismatchError: if a model has no such layers, or layers in more than one stack.
    """
    first, last = models[pieces[0].path], models[pieces[-1].path]
    specs = {name: spec for name, spec in first.specs.items() if layer_of(name) is None and comes_first(name)}
    offset = 0
    kinds: list[int] = []
    for piece in pieces:
        model = models[piece.path]
        stacks = {match[1] for name in model.specs if (match := IN_STACK.match(name))}
        count = layer_count(model.specs)
        if len(stacks) != 1 or piece.stop > count:
            found = f"it has {count}" if len(stacks) == 1 else f"its layers lie in {len(stacks)} stacks"
            raise MismatchError(f"layers {piece.start} to {piece.stop} are asked of {piece.model}; {found}")
        for name, spec in model.specs.items():
            found_at, layer = IN_STACK.match(name), layer_of(name)
            if found_at and layer is not None and piece.start <= layer < piece.stop:
                new = f"{name[: found_at.start(2)]}{offset + layer - piece.start}{name[found_at.end(2) :]}"
                specs[new] = replace(spec, name=new)
        kinds.extend(range(piece.start, piece.stop))
        offset += piece.count
    specs |= {name: spec for name, spec in last.specs.items() if layer_of(name) is None and not comes_first(name)}
    return replace(first, specs=specs, config=_config(first, kinds))


def as_deep_as(model: Checkpoint, other: Checkpoint) -> Checkpoint:
    """A model whose config says as many layers as another's, to compare the rest of them."""
    keys = {key: value for key, value in other.config.items() if key in _COUNTS or key.endswith("layer_types")}
    return replace(model, config={**model.config, **keys})


def _config(model: Checkpoint, layers: Sequence[int]) -> dict[str, Any]:
    count, config = layer_count(model.specs), dict(model.config)
    for key, value in model.config.items():
        if key in _COUNTS and value == count:
            config[key] = len(layers)
        elif key.endswith("layer_types") and isinstance(value, list) and len(value) == count:
            config[key] = [value[layer] if layer < count else value[-1] for layer in layers]
    return config
