"""Shows a router what it looks at in a model: hidden states, pooled and caught on their way."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from twinmerge.errors import MismatchError
from twinmerge.hf.heads import take
from twinmerge.hf.loading import without_weights
from twinmerge.routing.router import Batch
from twinmerge.routing.tokens import token_ids
from twinmerge.runtime.gate import GateSlot
from twinmerge.twin.features import Layers
from twinmerge.twin.recipe import RouterSettings

Run = Callable[[Tensor, Mapping[str, Any]], ModelOutput]
"""Answers inputs under a gate (row, expert)."""


class Looked(Batch):
    """The inputs of one call as a router sees them; a pass that it looks at under a gate is kept, as it may be right.

    Attributes:
        gate: (row, expert) of the pass that was kept; None if there was none.
        outputs: of that pass.
    """

    def __init__(self, features: Callable[..., Tensor], inputs: Mapping[str, Any], run: Run | None = None) -> None:
        """Take inputs; nothing is computed yet.

        Args:
            features: `TwinModel.features_as`.
            inputs: of the call.
            run: answers the call; None where features alone are wanted.
        """
        self.features, self.inputs, self.run = features, inputs, run
        self.gate: Tensor | None = None
        self.outputs: Any = None

    @property
    def ids(self) -> Tensor:
        """(row, seq) token ids."""
        return token_ids(self.inputs)

    def hidden(self, layers: Layers, gate: Tensor | None = None) -> Tensor:
        """(row, feature) under a gate."""
        if gate is None or self.run is None:
            return self.features(layers, gate, **self.inputs)
        self.gate, self.outputs = gate, self.run(gate, {**self.inputs, "output_hidden_states": True})
        return pooled(self.outputs, layers, self.inputs.get("attention_mask"))

    def take(self, rows: Tensor) -> "Looked":
        """Some of the rows."""
        count = next(len(value) for value in self.inputs.values() if isinstance(value, Tensor))
        return Looked(self.features, take(self.inputs, rows.tolist(), count))


class EnoughError(Exception):
    """Ends a pass whose remaining layers nobody needs."""


class Probe:
    """Looks at hidden states as they pass, pools those that the router wants, and ends the pass after the last."""

    def __init__(self, wanted: Sequence[int], mask: Tensor | None) -> None:
        """Wait for hidden states.

        Args:
            wanted: which; K is what enters layer K.
            mask: (batch, seq), 1 for real tokens.
        """
        self.wanted = list(wanted)
        self.mask = mask
        self.pooled: dict[int, Tensor] = {}

    def see(self, index: int, states: Tensor) -> None:
        """Hidden states on their way into a layer."""
        if index in self.wanted:
            self.pooled[index] = pool(states, self.mask)
            if index == max(self.wanted):
                raise EnoughError

    def features(self) -> Tensor:
        """(batch, feature), as `wanted` orders them."""
        return torch.cat([self.pooled[index] for index in self.wanted], dim=1)


def reader(model: Any) -> Any:
    """What reads an input: the encoder of a model that has a decoder too, else the model without its head."""
    return model.get_encoder() if model.config.is_encoder_decoder else model.base_model


def read(model: Any, inputs: Mapping[str, Any]) -> ModelOutput:
    """The outputs of a model's `reader`."""
    own = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    outputs: ModelOutput = reader(model)(**own, return_dict=True)
    return outputs


def hidden_layers(backbone: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The layers that hidden states pass through one after the other; none where the model has no single such list."""
    count = getattr(backbone.config, "num_hidden_layers", None)
    lists = [m for m in reader(backbone).modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return tuple(lists[0]) if len(lists) == 1 else ()


def show(slot: GateSlot, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Before a layer runs: what enters it is shown to the probe of the call under way."""
    if slot.probe is not None:
        slot.probe.see(index, args[0] if args else kwargs["hidden_states"])


def pooled(outputs: Any, layers: Layers, mask: Tensor | None) -> Tensor:
    """Features (row, feature) of a pass: of what its `reader` gave, or the whole model."""
    if layers.chosen == "last":
        return pool(outputs[0], mask)
    states = outputs.get("encoder_hidden_states") or outputs["hidden_states"]
    return torch.cat([pool(states[layer], mask) for layer in layers.among(len(states))], dim=1)


def pool(states: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real tokens of (batch, seq, hidden), the positions of (batch, hidden, h, w), in float32."""
    if not isinstance(states, Tensor):
        raise MismatchError("a model without one hidden state a token cannot route by them; route by tokens")
    states = states.float()
    if states.ndim == 4:
        return states.flatten(2).mean(dim=2)
    if mask is None:
        return states.mean(dim=1)
    if len(states) != len(mask) or states.shape[1] < mask.shape[1]:
        raise MismatchError(
            f"hidden states of {tuple(states.shape[:2])} are not those of {tuple(mask.shape)} tokens; route by tokens "
            "(router: {features: tokens})"
        )
    states = states[:, : mask.shape[1]]  # some classes fill up to a whole number of blocks
    weights = mask.to(states).unsqueeze(-1)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)


def check_router(folder: Path, settings: RouterSettings) -> None:
    """Refuse features that a model cannot give, before anything is built; no weight is read.

    Args:
        folder: of the model.
        settings: the recipe's.

    Raises:
        MismatchError: if the model has no such layers.
    """
    count = getattr(without_weights(folder).config.get_text_config(), "num_hidden_layers", None)
    if settings.features.layers is not None and count is not None:
        settings.features.layers.among(count + 1)
