"""Merges models that lie in memory, as the engine merges those on disk."""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from twinmerge.merging.engine import merge_tensor
from twinmerge.merging.method import Chunk, Method
from twinmerge.merging.statistics import Statistics

State = Mapping[str, Tensor]


def chunks(base: State, experts: Mapping[str, State], entries: int = 1000, name: str | None = None) -> Iterator[Chunk]:
    """Stretches of one tensor, or of all, one after the other."""
    for tensor in base if name is None else [name]:
        for start in range(0, base[tensor].numel(), entries):
            part = slice(start, start + entries)
            values = {expert: state[tensor].flatten()[part] for expert, state in experts.items()}
            yield Chunk(tensor, start, base[tensor].flatten()[part], values)


def whole(base: State, experts: Mapping[str, State], name: str) -> Iterator[Chunk]:
    """One tensor in its shape."""
    yield Chunk(name, 0, base[name], {expert: state[name] for expert, state in experts.items()})


def merge(
    method: Method,
    base: State,
    experts: Mapping[str, State],
    *,
    entries: int = 1000,
    dtype: torch.dtype = torch.float64,
    statistics: Statistics | None = None,
) -> dict[str, Tensor]:
    """Every tensor merged, with the method's pre-pass before."""
    if statistics is None:
        statistics = Statistics(model=method.prepass(partial(chunks, base, experts, entries)))
    merged = {}
    for name, tensor in base.items():

        def read(at_once: bool, name: str = name) -> Iterator[Chunk]:
            return whole(base, experts, name) if at_once else chunks(base, experts, entries, name)

        at_once = method.takes_whole(name, tuple(tensor.shape))
        parts = [values for _, values in merge_tensor(method, read, statistics, dtype, whole=at_once)]
        merged[name] = torch.cat(parts).view(tensor.shape)
    return merged


def models(count: int = 3, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A base and experts of three tensors with random float32 values."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"bias": (5,), "conv": (2, 3, 2, 2), "weight": (4, 6)}
    base, *experts = (
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(count + 1)
    )
    return base, {f"e{i}": expert for i, expert in enumerate(experts)}


def in_dtype(state: State, dtype: torch.dtype) -> dict[str, Tensor]:
    """A model in another dtype."""
    return {name: tensor.to(dtype) for name, tensor in state.items()}
