"""Shows a router what it looks at in a model: hidden states, pooled and caught on their way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from twinmerge.errors import MismatchError
from twinmerge.hf.heads import take
from twinmerge.hf.loading import without_weights
from twinmerge.routing.router import Batch
from twinmerge.routing.tokens import token_ids
from twinmerge.runtime.gate import GateSlot
from twinmerge.twin.features import Features, Layers
from twinmerge.twin.recipe import RouterSettings


@dataclass(frozen=True)
class Looked(Batch):
    """The inputs of one call as a router sees them."""

    features: Callable[..., Tensor]
    """`TwinModel.features_as`."""
    inputs: Mapping[str, Any]

    @property
    def ids(self) -> Tensor:
        """(row, seq) token ids."""
        return token_ids(self.inputs)

    def hidden(self, layers: Layers, gate: Tensor | None = None) -> Tensor:
        """(row, feature) under a gate."""
        return self.features(layers, gate, **self.inputs)

    def take(self, rows: Tensor) -> "Looked":
        """Some of the rows."""
        count = next(len(value) for value in self.inputs.values() if isinstance(value, Tensor))
        return Looked(self.features, take(self.inputs, rows.tolist(), count))


class EnoughError(Exception):
    """Ends a pass whose remaining layers nobody needs."""


class Probe:
    """Looks at hidden states as they pass, and pools those that the router wants."""

    def __init__(
        self, wanted: Sequence[int], mask: Tensor | None, done: Callable[[Tensor], None] | None = None
    ) -> None:
        """Wait for hidden states.

        Args:
            wanted: which; K is what enters layer K.
            mask: (batch, seq), 1 for real tokens.
            done: called with the features once the last one wanted was seen; None ends the pass there.
        """
        self.wanted = list(wanted)
        self.mask = mask
        self.done = done
        self.pooled: dict[int, Tensor] = {}

    def see(self, index: int, states: Tensor) -> None:
        """Hidden states on their way into a layer."""
        if index in self.wanted:
            self.pooled[index] = pool(states, self.mask)
            if index == max(self.wanted):
                if self.done is None:
                    raise EnoughError
                self.done(self.features())

    def features(self) -> Tensor:
        """(batch, feature), as `wanted` orders them."""
        return torch.cat([self.pooled[index] for index in self.wanted], dim=1)


def hidden_layers(backbone: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The layers that hidden states pass through one after the other; none where the model has no single such list."""
    count = getattr(backbone.config, "num_hidden_layers", None)
    lists = [m for m in backbone.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return tuple(lists[0]) if len(lists) == 1 else ()


def show(slot: GateSlot, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Before a layer runs: what enters it is shown to the probe of the call under way."""
    if slot.probe is not None:
        slot.probe.see(index, args[0] if args else kwargs["hidden_states"])


def pool(states: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real tokens of (batch, seq, hidden), the positions of (batch, hidden, h, w), in float32."""
    states = states.float()
    if states.ndim == 4:
        return states.flatten(2).mean(dim=2)
    if mask is None:
        return states.mean(dim=1)
    weights = mask.to(states).unsqueeze(-1)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)


def check_router(folder: Path, settings: RouterSettings) -> None:
    """Refuse features that a model cannot give, before anything is built; no weight is read.

    Args:
        folder: of the model.
        settings: the recipe's.

    Raises:
        MismatchError: if the model has no such layers, `one_pass` leaves none to gate, or there is no single list of
            layers to watch.
    """
    model = without_weights(folder)
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if settings.features.layers is not None and count is not None:
        settings.features.layers.among(count + 1)
    if settings.one_pass:
        check_one_pass(settings.features, len(hidden_layers(model)))


def check_one_pass(features: Features, layers: int) -> list[int]:
    """The hidden states that a router looks at, which must leave layers above them, of so many."""
    if not layers:
        raise MismatchError("router.one_pass needs a model whose hidden states pass through one list of layers")
    chosen = [] if features.layers is None else features.layers.among(layers + 1)
    if not chosen or max(chosen) >= layers:
        raise MismatchError(f"router.one_pass needs features of layers below the last, {layers}, found {features}")
    return chosen
