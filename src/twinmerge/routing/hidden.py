"""Scores inputs by hidden states: four heads on standardised features, and the distance to the nearest expert."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from twinmerge.routing.calibrate import cross_entropy
from twinmerge.routing.router import Batch, Examples, Scorer
from twinmerge.twin.features import Layers
from twinmerge.twin.recipe import RouterSettings

_BATCH = 64
_REGULARISATIONS = (0.001, 0.01, 0.1, 1.0)


class Rows(NamedTuple):
    """Standardised features of router data."""

    features: Tensor
    """(row, feature)."""
    labels: Tensor
    """(row,) the expert's index."""
    weights: Tensor
    """(row,) what each row counts."""


class RouterHead(nn.Module, ABC):
    """Features, standardised, in; router logits (batch, expert) out."""

    @abstractmethod
    def fit(self, rows: Rows, held_out: Rows, settings: RouterSettings) -> None:
        """Learn from router data; `held_out` only selects."""

    def refit(self, rows: Rows) -> None:
        """Learn once more from all router data, as `fit` chose; a head that would have to choose again stays."""


class MLPHead(RouterHead):
    """The paper's network: two hidden layers of twice the feature size, batch norm, dropout 0.5 (METHOD §4)."""

    def __init__(self, feature_size: int, experts: int) -> None:
        """Make an untrained network."""
        super().__init__()
        hidden = 2 * feature_size
        self.layers = nn.Sequential(
            nn.Linear(feature_size, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(), nn.Dropout(0.5),
            nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(), nn.Dropout(0.5),
            nn.Linear(hidden, experts),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        """(batch, feature) -> (batch, expert)."""
        logits: Tensor = self.layers(features)
        return logits

    def fit(self, rows: Rows, held_out: Rows, settings: RouterSettings) -> None:
        """Cross-entropy with AdamW; the epoch with the lowest held-out loss stays."""
        optimiser = torch.optim.AdamW(self.parameters(), lr=settings.learning_rate)
        best_loss, best_state = float("inf"), self.state_dict()
        for _ in range(settings.epochs):
            self.train()
            for batch in torch.split(torch.randperm(len(rows.labels)), _BATCH):
                if len(batch) < 2:
                    continue
                optimiser.zero_grad()
                logits = self(rows.features[batch])
                torch.autograd.backward(cross_entropy(logits, rows.labels[batch], rows.weights[batch]))
                optimiser.step()
            self.eval()
            with torch.no_grad():
                loss = float(cross_entropy(self(held_out.features), held_out.labels, held_out.weights))
            if loss < best_loss:
                best_loss, best_state = loss, {k: v.clone() for k, v in self.state_dict().items()}
        self.load_state_dict(best_state)


class LinearHead(RouterHead):
    """Multinomial logistic regression; the strength of the regularisation is chosen on held-out inputs."""

    def __init__(self, feature_size: int, experts: int) -> None:
        """Make an untrained head."""
        super().__init__()
        self.layer = nn.Linear(feature_size, experts)
        self.strength = _REGULARISATIONS[0]

    def forward(self, features: Tensor) -> Tensor:
        """(batch, feature) -> (batch, expert)."""
        logits: Tensor = self.layer(features)
        return logits

    @torch.no_grad()
    def fit(self, rows: Rows, held_out: Rows, settings: RouterSettings) -> None:
        """Fit at each regularisation; the lowest held-out loss stays."""
        best_loss = float("inf")
        weight, bias = torch.zeros_like(self.layer.weight), torch.zeros_like(self.layer.bias)
        for strength in _REGULARISATIONS:
            weight, bias = _logistic_regression(rows, strength, weight, bias)
            logits = held_out.features @ weight.T + bias
            loss = float(cross_entropy(logits, held_out.labels, held_out.weights))
            if loss < best_loss:
                best_loss, self.strength = loss, strength
                self.layer.weight.copy_(weight)
                self.layer.bias.copy_(bias)

    @torch.no_grad()
    def refit(self, rows: Rows) -> None:
        """Fit at the chosen regularisation, from where the last fit ended."""
        start = self.layer.weight.detach(), self.layer.bias.detach()
        weight, bias = _logistic_regression(rows, self.strength, *start)
        self.layer.weight.copy_(weight)
        self.layer.bias.copy_(bias)


def _logistic_regression(rows: Rows, strength: float, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise mean cross-entropy + strength/2 * |weight|^2 / experts with L-BFGS, from the given start."""
    with torch.enable_grad():
        weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        optimiser = torch.optim.LBFGS([weight, bias], max_iter=100, history_size=20, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            value = cross_entropy(rows.features @ weight.T + bias, rows.labels, rows.weights)
            value = value + 0.5 * strength / len(bias) * weight.square().sum()
            torch.autograd.backward(value)
            return value

        optimiser.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


class CentroidHead(RouterHead):
    """Nearest class mean; needs no training."""

    centroids: Tensor

    def __init__(self, feature_size: int, experts: int) -> None:
        """Make a head without centroids."""
        super().__init__()
        self.register_buffer("centroids", torch.zeros(experts, feature_size))

    def forward(self, features: Tensor) -> Tensor:
        """Minus half the mean squared distance to each centroid, (batch, expert)."""
        return -0.5 * torch.cdist(features, self.centroids).square() / features.shape[1]

    @torch.no_grad()
    def fit(self, rows: Rows, held_out: Rows, settings: RouterSettings) -> None:
        """Average the features of each expert's inputs."""
        self.centroids = _centroids(rows, len(self.centroids))


class NeighboursHead(RouterHead):
    """k nearest neighbours by cosine; needs no training, keeps the router data's features in float16."""

    features: Tensor
    labels: Tensor
    neighbours: Tensor

    def __init__(self, feature_size: int, experts: int, rows: int = 0) -> None:
        """Make a head for `rows` stored inputs."""
        super().__init__()
        self.experts = experts
        self.register_buffer("features", torch.zeros(rows, feature_size, dtype=torch.float16))
        self.register_buffer("labels", torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("neighbours", torch.tensor(1))

    def forward(self, features: Tensor) -> Tensor:
        """Log of each expert's share among the neighbours, smoothed by one vote in all, (batch, expert).

        An expert with half as many stored inputs has votes of twice the weight.
        """
        counts = torch.bincount(self.labels, minlength=self.experts)
        votes_of = (len(self.labels) / (self.experts * counts.clamp_min(1))).to(features.dtype)
        stored = self.features.to(features.dtype)
        nearest = (nn.functional.normalize(features, dim=1) @ stored.T).topk(int(self.neighbours), dim=1)
        owner = self.labels[nearest.indices]
        votes = features.new_full((len(features), self.experts), 1.0 / self.experts)
        votes.scatter_add_(1, owner, nearest.values.clamp_min(0) * votes_of[owner])
        return (votes / votes.sum(dim=1, keepdim=True)).log()

    @torch.no_grad()
    def fit(self, rows: Rows, held_out: Rows, settings: RouterSettings) -> None:
        """Keep the inputs."""
        self.features = nn.functional.normalize(rows.features, dim=1).half()
        self.labels = rows.labels
        self.neighbours = torch.tensor(min(settings.neighbours, len(rows.labels)))


HEADS: Mapping[str, Callable[..., RouterHead]] = {
    "mlp": MLPHead,
    "linear": LinearHead,
    "centroid": CentroidHead,
    "knn": NeighboursHead,
}


class Hidden(Scorer):
    """Scores by a head on hidden states; strange is what lies far from every expert's centroid."""

    mean: Tensor
    deviation: Tensor
    centroids: Tensor

    def __init__(self, layers: Layers, head: RouterHead, feature_size: int, experts: int) -> None:
        """Make an untrained scorer.

        Args:
            layers: which hidden states it looks at.
            head: on their features.
            feature_size: numbers an input has.
            experts: columns of the logits.
        """
        super().__init__()
        self.layers = layers
        self.head = head
        self.register_buffer("mean", torch.zeros(feature_size))
        self.register_buffer("deviation", torch.ones(feature_size))
        self.register_buffer("centroids", torch.zeros(experts, feature_size))

    def score(self, batch: Batch, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits, and the root mean squared distance to the nearest centroid, of hidden states under a gate."""
        features = batch.hidden(self.layers, gate)
        with torch.autocast(features.device.type, enabled=False):
            standard = self._standard(features)
            nearest = torch.cdist(standard, self.centroids).amin(dim=1)
            return self.head(standard), nearest / standard.shape[1] ** 0.5

    def fit(self, training: Examples, held_out: Examples, settings: RouterSettings) -> None:
        """Standardise by the training inputs, and fit the head."""
        features = training.batch.hidden(self.layers).float()
        self.mean, self.deviation = features.mean(dim=0), features.std(dim=0).clamp_min(1e-6)
        rows = self._rows(training)
        self.centroids = _centroids(rows, len(self.centroids))
        self.head.fit(rows, self._rows(held_out), settings)

    def refit(self, everything: Examples) -> None:
        """Fit the head once more; standardisation and centroids stay."""
        self.head.refit(self._rows(everything))

    def _standard(self, features: Tensor) -> Tensor:
        return (features.to(self.mean.dtype) - self.mean) / self.deviation

    def _rows(self, examples: Examples) -> Rows:
        return Rows(self._standard(examples.batch.hidden(self.layers)), examples.labels, examples.weights)


def _centroids(rows: Rows, experts: int) -> Tensor:
    share = nn.functional.one_hot(rows.labels, experts) * rows.weights[:, None]
    return (share / share.sum(dim=0)).T @ rows.features
