"""Sends inputs to experts: what a router may look at, the scores it gives, and the gate that follows from them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from twinmerge.errors import GateError
from twinmerge.routing.calibrate import best_temperature, confusable_groups, confusion
from twinmerge.twin.features import Layers
from twinmerge.twin.recipe import RouterSettings

_SAME = 1e-6
"""Energies that differ by no more say nothing: those of k nearest neighbours are all the same."""


class Batch(ABC):
    """What a router may look at of some inputs; nothing is computed before it is asked for."""

    @property
    @abstractmethod
    def ids(self) -> Tensor:
        """(row, seq) token ids, `tokens.PADDING` where there is none."""

    @abstractmethod
    def hidden(self, layers: Layers, gate: Tensor | None = None) -> Tensor:
        """(row, feature): hidden states averaged over real tokens, any float dtype.

        Args:
            layers: which.
            gate: (row, expert) under which the inputs run; None is the shared expert alone.
        """

    @abstractmethod
    def take(self, rows: Tensor) -> "Batch":
        """Some of the inputs, by their numbers (count,)."""


@dataclass(frozen=True)
class Stored(Batch):
    """A batch whose features were computed before, under whatever gate that was."""

    features: Mapping[Layers, Tensor]
    tokens: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        """As given.

        Raises:
            GateError: if there are none.
        """
        if self.tokens is None:
            raise GateError("a router that looks at tokens needs token ids, and there are none")
        return self.tokens

    def hidden(self, layers: Layers, gate: Tensor | None = None) -> Tensor:
        """As given.

        Raises:
            GateError: if they were not.
        """
        if layers not in self.features:
            raise GateError(f"a router that looks at hidden states needs those of {layers}, and there are none")
        return self.features[layers]

    def take(self, rows: Tensor) -> "Stored":
        """Some of the inputs."""
        features = {layers: values[rows] for layers, values in self.features.items()}
        return Stored(features, None if self.tokens is None else self.tokens[rows])


@dataclass(frozen=True)
class Examples:
    """Inputs that belong to known experts."""

    batch: Batch
    labels: Tensor
    """(row,) the expert's index."""
    weights: Tensor
    """(row,) so that every expert counts the same, whatever the number of its inputs; about 1 in the mean."""

    def take(self, rows: Tensor) -> "Examples":
        """Some of them."""
        return Examples(self.batch.take(rows), self.labels[rows], self.weights[rows])


@dataclass(frozen=True)
class Routing:
    """Where a batch of inputs goes."""

    gate: Tensor
    """(batch, expert), rows sum to 1; zeros where `fallback`."""
    router_logits: Tensor
    """(batch, expert), before temperature and softmax."""
    probability: Tensor
    """(batch, expert), calibrated: 0.9 is right nine times in ten among inputs like the router data."""
    fallback: Tensor
    """(batch,), bool: unlike every expert's inputs, left to the shared expert."""

    @property
    def expert(self) -> Tensor:
        """(batch,), the expert with the largest gate, whose head answers; the likeliest where all gates are 0."""
        return torch.where(self.fallback, self.router_logits.argmax(dim=1), self.gate.argmax(dim=1))

    def overlaid(self, rows: Tensor, others: "Routing") -> "Routing":
        """The same with `rows` (count,) taken from others."""
        return Routing(*(getattr(self, f.name).index_copy(0, rows, getattr(others, f.name)) for f in fields(self)))


class Scorer(nn.Module, ABC):
    """Router logits for a batch, and how strange each input is; `hidden`, `tokens` and `combined` hold the kinds."""

    @abstractmethod
    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (row, expert), float32; and (row,) how far an input is from all that the scorer knows."""

    @abstractmethod
    def fit(self, training: Examples, held_out: Examples, settings: RouterSettings) -> None:
        """Learn from router data; `held_out` only selects and calibrates."""

    @abstractmethod
    def refit(self, everything: Examples) -> None:
        """Learn once more from all router data, as `fit` chose."""


class Router(nn.Module):
    """A scorer with its temperature and fall-back distance (METHOD §4)."""

    temperature: Tensor
    fallback_distance: Tensor
    energy: Tensor
    groups: Tensor

    def __init__(self, expert_names: Sequence[str], settings: RouterSettings, scorer: Scorer) -> None:
        """Make an uncalibrated router; `fit_router` makes useful ones.

        Args:
            expert_names: the gate's columns.
            settings: what it looks at, and the form of its gate.
            scorer: what it decides by.
        """
        super().__init__()
        self.expert_names = tuple(expert_names)
        self.settings = settings
        self.scorer = scorer
        self.report: dict[str, Any] = {}
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("fallback_distance", torch.tensor(float("inf")))
        if settings.gate == "groups":
            self.register_buffer("groups", torch.arange(len(self.expert_names)))  # whose gates are mixed
        if settings.detector == "both":
            self.register_buffer("energy", torch.tensor([0.0, 0.0]))  # its weight beside the distance, and its floor

    @torch.no_grad()
    def route(self, batch: Batch) -> Routing:
        """Gate, scores and fall-back flags of every input."""
        logits, distance = self.look(batch)
        strange = self.strangeness(logits, distance) > self.fallback_distance
        return self._routing(logits, self.temperature, strange)

    def look(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (row, expert), and (row,) how strange every input is."""
        return self.scorer.score(batch)

    def strangeness(self, logits: Tensor, distance: Tensor) -> Tensor:
        """(row,) how unlike the router data an input is, by `settings.detector`.

        Energy is low where some expert is likely beyond doubt. Lower than usual counts as usual: a huge logit far from
        all data makes nothing familiar.
        """
        if self.settings.detector == "distance":
            return distance
        energy = self._energy(logits)
        if self.settings.detector == "energy":
            return energy
        return distance + self.energy[0] * energy.clamp_min(self.energy[1])

    def _energy(self, logits: Tensor) -> Tensor:
        return -(logits / self.temperature).logsumexp(dim=1)

    @torch.no_grad()
    def calibrate(self, held_out: Examples) -> dict[str, float]:
        """Fit temperature, fall-back distance and groups on inputs that the scorer has not learned from.

        Returns:
            What the report says besides.
        """
        logits, distance = self.look(held_out.batch)
        self.temperature = torch.tensor(best_temperature(logits, held_out.labels, held_out.weights))
        if self.settings.gate == "groups":
            shares = confusion(logits.argmax(dim=1), held_out.labels, len(self.expert_names))
            self.groups = confusable_groups(shares)
        if self.settings.detector == "both":
            energy = self._energy(logits)
            spread = energy.std(correction=0)
            weight = distance.std(correction=0) / spread if spread > _SAME else torch.zeros(())
            self.energy = torch.stack([weight, energy.mean() - 2 * spread])
        if self.settings.fallback is not None:
            self.fallback_distance = self.strangeness(logits, distance).quantile(self.settings.fallback)
        return {}

    def _routing(self, logits: Tensor, temperature: Tensor, fallback: Tensor) -> Routing:
        probability = (logits / temperature).softmax(dim=1)
        gate = gate_of(probability, self.settings, self.groups if self.settings.gate == "groups" else None)
        return Routing(gate * ~fallback[:, None], logits, probability, fallback)


def gate_of(probability: Tensor, settings: RouterSettings, groups: Tensor | None = None) -> Tensor:
    """The gate that follows from calibrated probabilities, in the form that a recipe asks for.

    Args:
        probability: (row, expert).
        settings: of the router.
        groups: (expert,) the number of each expert's group, for gates of groups.

    Returns:
        (row, expert), rows sum to 1.
    """
    if settings.gate == "soft":
        return probability
    if groups is not None:
        sums = torch.zeros_like(probability).index_add_(1, groups, probability)
        own = probability * (groups == sums.argmax(dim=1, keepdim=True))
        return own / own.sum(dim=1, keepdim=True)
    kept = 1 if settings.gate == "hard" else min(settings.top_k, probability.shape[1])
    largest, column = probability.topk(kept, dim=1)
    return torch.zeros_like(probability).scatter_(1, column, largest / largest.sum(dim=1, keepdim=True))
