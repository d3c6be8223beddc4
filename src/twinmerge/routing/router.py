"""Knows how features become gates: heads, calibration and the fall-back to the shared expert."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twinmerge.errors import DataError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.writer import save_tensors
from twinmerge.routing.tokens import NgramHead, join_ids
from twinmerge.twin.recipe import RouterSettings

_BINS = 15
_BATCH = 64
_REGULARISATIONS = (0.001, 0.01, 0.1, 1.0)
_TOKEN_WEIGHTS = tuple(2.0**power for power in range(-4, 6))
_CASCADE_LOSS = 0.001
"""Share of the held-out inputs that a cascade may send wrong beyond what full features would."""


@dataclass(frozen=True)
class Routing:
    """Where a batch of inputs goes."""

    gate: Tensor
    """(batch, expert), rows sum to 1; zeros where `fallback`."""
    router_logits: Tensor
    """(batch, expert), before temperature and softmax."""
    fallback: Tensor
    """(batch,), bool: unlike every expert's inputs, left to the shared expert."""

    @property
    def expert(self) -> Tensor:
        """(batch,), the likeliest expert, whose head answers."""
        return self.router_logits.argmax(dim=1)

    def overlaid(self, rows: Tensor, others: "Routing") -> "Routing":
        """The same with `rows` (count,) taken from others."""
        return Routing(
            self.gate.index_copy(0, rows, others.gate),
            self.router_logits.index_copy(0, rows, others.router_logits),
            self.fallback.index_copy(0, rows, others.fallback),
        )


class RouterHead(nn.Module, ABC):
    """Features, standardised, in; router logits (batch, expert) out."""

    @abstractmethod
    def fit(self, features: Tensor, labels: Tensor, held_out: tuple[Tensor, Tensor], settings: RouterSettings) -> None:
        """Learn from router data; `held_out` only selects."""

    def refit(self, features: Tensor, labels: Tensor) -> None:
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

    def fit(self, features: Tensor, labels: Tensor, held_out: tuple[Tensor, Tensor], settings: RouterSettings) -> None:
        """Cross-entropy with AdamW; the epoch with the lowest held-out loss stays."""
        optimiser = torch.optim.AdamW(self.parameters(), lr=settings.learning_rate)
        best_loss, best_state = float("inf"), self.state_dict()
        for _ in range(settings.epochs):
            self.train()
            for rows in torch.split(torch.randperm(len(labels)), _BATCH):
                if len(rows) < 2:
                    continue
                optimiser.zero_grad()
                torch.autograd.backward(nn.functional.cross_entropy(self(features[rows]), labels[rows]))
                optimiser.step()
            self.eval()
            with torch.no_grad():
                loss = float(nn.functional.cross_entropy(self(held_out[0]), held_out[1]))
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
    def fit(self, features: Tensor, labels: Tensor, held_out: tuple[Tensor, Tensor], settings: RouterSettings) -> None:
        """Fit at each regularisation; the lowest held-out loss stays."""
        best_loss = float("inf")
        weight, bias = torch.zeros_like(self.layer.weight), torch.zeros_like(self.layer.bias)
        experts = len(bias)
        for strength in _REGULARISATIONS:
            weight, bias = _logistic_regression(features, labels, experts, strength, weight, bias)
            loss = float(nn.functional.cross_entropy(held_out[0] @ weight.T + bias, held_out[1]))
            if loss < best_loss:
                best_loss, self.strength = loss, strength
                self.layer.weight.copy_(weight)
                self.layer.bias.copy_(bias)

    @torch.no_grad()
    def refit(self, features: Tensor, labels: Tensor) -> None:
        """Fit at the chosen regularisation, from where the last fit ended."""
        start = self.layer.weight.detach(), self.layer.bias.detach()
        weight, bias = _logistic_regression(features, labels, len(start[1]), self.strength, *start)
        self.layer.weight.copy_(weight)
        self.layer.bias.copy_(bias)


def _logistic_regression(
    features: Tensor, labels: Tensor, experts: int, strength: float, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Minimise mean cross-entropy + strength/2 * |weight|^2 / experts with L-BFGS, from the given start."""
    with torch.enable_grad():
        weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        optimiser = torch.optim.LBFGS([weight, bias], max_iter=100, history_size=20, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            value = nn.functional.cross_entropy(features @ weight.T + bias, labels)
            value = value + 0.5 * strength / experts * weight.square().sum()
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
    def fit(self, features: Tensor, labels: Tensor, held_out: tuple[Tensor, Tensor], settings: RouterSettings) -> None:
        """Average the features of each expert's inputs."""
        self.centroids = _centroids(features, labels, len(self.centroids))


class NeighboursHead(RouterHead):
    """k nearest neighbours by cosine; needs no training, keeps the router data's features in float16."""

    features: Tensor
    labels: Tensor
    neighbours: Tensor

    def __init__(self, feature_size: int, experts: int, rows: int = 0, neighbours: int = 1) -> None:
        """Make a head for `rows` stored inputs."""
        super().__init__()
        self.experts = experts
        self.register_buffer("features", torch.zeros(rows, feature_size, dtype=torch.float16))
        self.register_buffer("labels", torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("neighbours", torch.tensor(neighbours))

    def forward(self, features: Tensor) -> Tensor:
        """Log of each expert's share among the neighbours, smoothed by one vote in all, (batch, expert)."""
        stored = self.features.to(features.dtype)
        nearest = (nn.functional.normalize(features, dim=1) @ stored.T).topk(int(self.neighbours), dim=1)
        votes = torch.full(
            (len(features), self.experts), 1.0 / self.experts, dtype=features.dtype, device=features.device
        )
        votes.scatter_add_(1, self.labels[nearest.indices], nearest.values.clamp_min(0))
        return (votes / votes.sum(dim=1, keepdim=True)).log()

    @torch.no_grad()
    def fit(self, features: Tensor, labels: Tensor, held_out: tuple[Tensor, Tensor], settings: RouterSettings) -> None:
        """Keep the inputs."""
        self.features = nn.functional.normalize(features, dim=1).half()
        self.labels = labels
        self.neighbours = torch.tensor(min(settings.neighbours, len(labels)))


HEADS: Mapping[str, Callable[..., RouterHead]] = {
    "mlp": MLPHead,
    "linear": LinearHead,
    "centroid": CentroidHead,
    "knn": NeighboursHead,
}


class Router(nn.Module):
    """A head with its standardisation, temperature and fall-back distance (METHOD §4).

    With tokens beside hidden states, the logits of both are added, the tokens' times `ngrams.share`.
    """

    mean: Tensor
    deviation: Tensor
    centroids: Tensor
    temperature: Tensor
    fallback_distance: Tensor

    def __init__(
        self,
        head: RouterHead | None,
        expert_names: Sequence[str],
        feature_size: int,
        settings: RouterSettings,
        ngrams: NgramHead | None = None,
    ) -> None:
        """Make an uncalibrated router; `fit_router` makes useful ones.

        Args:
            head: on hidden states; None for a router that looks at tokens only.
            expert_names: the gate's columns.
            feature_size: of the hidden states, 0 without a head.
            settings: method and features.
            ngrams: on tokens; None for a router that looks at hidden states only.
        """
        super().__init__()
        self.head = head
        self.ngrams = ngrams
        self.expert_names = tuple(expert_names)
        self.settings = settings
        self.report: dict[str, Any] = {}
        self.register_buffer("mean", torch.zeros(feature_size))
        self.register_buffer("deviation", torch.ones(feature_size))
        self.register_buffer("centroids", torch.zeros(len(expert_names), feature_size))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("fallback_distance", torch.tensor(float("inf")))

    @torch.no_grad()
    def forward(self, features: Tensor | None, ids: Tensor | None = None) -> Routing:
        """Route a batch by everything the router looks at.

        Args:
            features: (batch, feature), of `settings.features.layers`, any float dtype; None if that is None.
            ids: (batch, seq) as `ngrams.token_ids` gives them; None if the router does not look at tokens.

        Returns:
            Gate, router logits and fall-back flags.
        """
        device = self.temperature.device.type
        with torch.autocast(device, enabled=False):
            logits, distance = self._look(features, ids)
            fallback = distance > self.fallback_distance
            gate = (logits / self.temperature).softmax(dim=1)
        return Routing(gate * ~fallback[:, None], logits, fallback)

    def decide(self, ids: Tensor | None, features: Callable[[Tensor | None], Tensor]) -> Routing:
        """Route a batch, asking for hidden states only where they are needed.

        Args:
            ids: (batch, seq), None if the router does not look at tokens.
            features: gives (count, feature) for row numbers (count,), for all rows given None. A cascade asks for the
                rows of which tokens alone are not certain; a router of tokens never asks.
        """
        if self.settings.features.form != "cascade":
            whole: Routing = self(features(None) if self.head is not None else None, ids)
            return whole
        first, certain = self._first_look(ids)
        rows = (~certain).nonzero()[:, 0]
        return first.overlaid(rows, self(features(rows), ids[rows])) if len(rows) else first  # type: ignore[index]

    @torch.no_grad()
    def _first_look(self, ids: Tensor | None) -> tuple[Routing, Tensor]:
        """By tokens alone; and (batch,) bool, whether that is enough."""
        ngrams: Any = self.ngrams
        logits, unseen = ngrams(ids)
        gate = (logits / ngrams.temperature).softmax(dim=1)
        return Routing(gate, logits, torch.zeros_like(unseen, dtype=torch.bool)), gate.amax(dim=1) >= ngrams.certainty

    def _look(self, features: Tensor | None, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits (batch, expert), and (batch,) how far an input is from what the router knows."""
        ngrams: Any = self.ngrams
        if self.head is None or features is None:
            found: tuple[Tensor, Tensor] = ngrams(ids)
            return found
        standard = self._standardise(features)
        logits: Tensor = self.head(standard)
        if ngrams is not None:
            logits = logits + ngrams.share * ngrams(ids)[0]
        return logits, self._distance(standard)

    def save(self, folder: Path) -> None:
        """Write router.json and router.safetensors; no pickle."""
        folder.mkdir()
        save_tensors({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "router.safetensors")
        content = {"expert_names": self.expert_names, "settings": self.settings.model_dump(), "report": self.report}
        (folder / "router.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Router":
        """Read a router back, to the bit."""
        content = json.loads((folder / "router.json").read_text(encoding="utf-8"))
        checkpoint = Checkpoint.open(folder / "router.safetensors")
        state = {name: checkpoint.read(name) for name in checkpoint.specs}
        settings = RouterSettings(**content["settings"])
        names, size = content["expert_names"], len(state["mean"])
        hidden = settings.features.layers is not None
        shape = {"rows": len(state["head.labels"])} if settings.method == "knn" and hidden else {}
        head = HEADS[settings.method](size, len(names), **shape) if hidden else None
        ngrams = NgramHead(len(names), len(state["ngrams.keys"])) if settings.features.tokens else None
        router = cls(head, names, size, settings, ngrams)
        router.load_state_dict(state)
        router.report = content["report"]
        return router.eval()

    def _standardise(self, features: Tensor) -> Tensor:
        return (features.to(self.mean.dtype) - self.mean) / self.deviation

    def _distance(self, standard: Tensor) -> Tensor:
        """Root mean squared distance to the nearest expert's centroid, (batch,)."""
        nearest = torch.cdist(standard, self.centroids).amin(dim=1)
        distance: Tensor = nearest / standard.shape[1] ** 0.5
        return distance


def fit_router(
    features: Mapping[str, Tensor] | None,
    settings: RouterSettings,
    *,
    seed: int,
    ids: Mapping[str, Tensor] | None = None,
) -> Router:
    """Fit a router on inputs that belong to known experts.

    Held-out inputs select and calibrate; then linear heads learn from them too, at what was selected. No label of any
    task and no test row is seen.

    Args:
        features: (rows, feature) by expert, in any order: the gate's columns are the sorted names; the same number of
            rows is used of each. None if `settings.features.layers` is.
        settings: method and its parameters.
        seed: of the split, the initialisation and the order of training.
        ids: (rows, seq) tokens of the same rows, as `ngrams.token_ids` gives them; needed if `settings` looks at them.

    Returns:
        A router in eval mode, with `report`: accuracy and calibration error (ECE, 15 bins) on inputs while they were
        held out, temperature, rows, and of a cascade the share of held-out inputs that take full features.

    Raises:
        DataError: if an expert has too few inputs to hold any out, or they have no n-gram in common.
        ValueError: if what the settings look at is not given.
    """
    looked = settings.features
    given = {"features": None if looked.layers is None else features, "ids": ids if looked.tokens else None}
    data = {what: values for what, values in given.items() if values is not None}
    if ("features" in data, "ids" in data) != (looked.layers is not None, looked.tokens):
        wanted = [what for what, asked in (("hidden states", looked.layers), ("ids", looked.tokens)) if asked]
        raise ValueError(f"features {settings.features} need {' and '.join(wanted)}")
    rows_of = {name: len(values) for name, values in next(iter(data.values())).items()}
    names = sorted(rows_of)
    count = min(settings.samples_per_expert, *rows_of.values())
    held = min(max(1, round(settings.held_out * count)), count - 1)
    if held < 1:
        fewest = min(names, key=rows_of.__getitem__)
        raise DataError(f"the router needs at least 2 inputs of every expert, found {count} of {fewest!r}")
    order = {name: torch.randperm(rows_of[name], generator=torch.Generator().manual_seed(seed)) for name in names}
    training = {what: _joined(what, [values[n][order[n][held:count]] for n in names]) for what, values in data.items()}
    held_out = {what: _joined(what, [values[n][order[n][:held]] for n in names]) for what, values in data.items()}
    y = torch.arange(len(names)).repeat_interleave(count - held)
    y_held = torch.arange(len(names)).repeat_interleave(held)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        size = training["features"].shape[1] if "features" in training else 0
        head = HEADS[settings.method](size, len(names)) if size else None
        router = Router(head, names, size, settings, NgramHead(len(names)) if "ids" in training else None)
        if router.ngrams is not None:
            router.ngrams.fit(training["ids"], y, (held_out["ids"], y_held))
        if head is not None:
            x = training["features"].float()
            router.mean, router.deviation = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
            standard = router._standardise(x)
            router.centroids = _centroids(standard, y, len(names))
            head.fit(standard, y, (router._standardise(held_out["features"]), y_held), settings)
    router.eval()
    _calibrate(router, held_out.get("features"), held_out.get("ids"), y_held)
    router.report.update(inputs_per_expert=count, held_out=len(y_held), feature_size=size)
    everything = torch.cat([y, y_held])
    if head is not None:
        both = torch.cat([training["features"], held_out["features"]]).float()
        head.refit(router._standardise(both), everything)
    if router.ngrams is not None:
        router.ngrams.refit(join_ids([training["ids"], held_out["ids"]]), everything)
    return router


def _joined(what: str, parts: Sequence[Tensor]) -> Tensor:
    return join_ids(parts) if what == "ids" else torch.cat(list(parts))


@torch.no_grad()
def _calibrate(router: Router, features: Tensor | None, ids: Tensor | None, labels: Tensor) -> None:
    """Fit what is left on held-out inputs: weights, temperatures, the fall-back distance; report what they give."""
    settings, ngrams = router.settings, router.ngrams
    if ngrams is not None and features is not None:
        read = ngrams(ids)[0]
        ngrams.share.zero_()
        logits = router._look(features, ids)[0]
        temperatures = {weight: _best_temperature(logits + weight * read, labels) for weight in _TOKEN_WEIGHTS}
        losses = {
            weight: float(nn.functional.cross_entropy((logits + weight * read) / temperature, labels))
            for weight, temperature in temperatures.items()
        }
        ngrams.share.fill_(min(losses, key=losses.__getitem__))
        ngrams.temperature = torch.tensor(_best_temperature(read, labels))
    logits, distance = router._look(features, ids)
    router.temperature = torch.tensor(_best_temperature(logits, labels))
    if settings.fallback is not None:
        router.fallback_distance = distance.quantile(settings.fallback)
    gate = (logits / router.temperature).softmax(dim=1)
    second_look = {}
    if settings.features.form == "cascade" and ngrams is not None:
        first = router._first_look(ids)[0].gate
        ngrams.certainty = _least_certainty(first, gate, labels)
        certain = first.amax(dim=1) >= ngrams.certainty
        gate = torch.where(certain[:, None], first, gate)
        second_look = {"second_look": float((~certain).float().mean())}
    confidence, chosen = gate.max(dim=1)
    correct = chosen == labels
    router.report = {
        "accuracy": float(correct.float().mean()),
        "calibration_error": calibration_error(confidence, correct),
        "temperature": float(router.temperature),
        **second_look,
    }


def _least_certainty(first: Tensor, full: Tensor, labels: Tensor) -> Tensor:
    """The lowest confidence of tokens alone (batch, expert) that, trusted, costs at most `_CASCADE_LOSS`.

    Counted from the most certain input on: how many more are wrong by tokens than by full features.
    """
    confidence, order = first.amax(dim=1).sort(descending=True, stable=True)
    wrong_first, wrong_full = (gates.argmax(dim=1) != labels for gates in (first, full))
    more_wrong = (wrong_first[order].long() - wrong_full[order].long()).cumsum(0)
    allowed = (more_wrong <= _CASCADE_LOSS * len(labels)).nonzero()[:, 0]
    return confidence[allowed[-1]] if len(allowed) else torch.tensor(float("inf"))


def _best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature with the lowest cross-entropy, on a logarithmic grid refined twice."""
    low, high = -5.0, 5.0
    best = 0.0
    for _ in range(3):
        grid = torch.linspace(low, high, 41)
        losses = [float(nn.functional.cross_entropy(logits / float(t.exp()), labels)) for t in grid]
        best = float(grid[min(range(len(losses)), key=losses.__getitem__)])
        step = (high - low) / 40
        low, high = best - step, best + step
    return float(torch.tensor(best).exp())


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Expected calibration error: mean gap of confidence and accuracy over 15 equal bins of confidence."""
    bins = (confidence * _BINS).long().clamp(max=_BINS - 1)
    gap = 0.0
    for index in torch.unique(bins):
        rows = bins == index
        gap += float(rows.float().mean()) * abs(float(confidence[rows].mean()) - float(correct[rows].float().mean()))
    return gap


def _centroids(features: Tensor, labels: Tensor, experts: int) -> Tensor:
    return torch.stack([features[labels == index].mean(dim=0) for index in range(experts)])


def group_gates(routing: Routing, groups: int = 20, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The paper's group-wise mode: bins by argmax, k-means on the gates inside each, gates averaged per group.

    Depends on the batch's composition, so it belongs to offline evaluation (METHOD §5).

    Args:
        routing: of all inputs together.
        groups: merged models in all, shared out among the bins by size, at least one each.
        seed: of k-means.

    Returns:
        (batch,) the group of every input, and (group, expert) the gates.
    """
    from sklearn.cluster import KMeans

    gate, chosen = routing.gate.cpu(), routing.expert.cpu()
    bins = torch.unique(chosen)
    spare = max(groups - len(bins), 0)
    assigned = torch.zeros(len(gate), dtype=torch.int64)
    means: list[Tensor] = []
    done = 0
    for index in bins:
        rows = (chosen == index).nonzero()[:, 0]
        share = spare * (done + len(rows)) // len(gate) - spare * done // len(gate)
        done += len(rows)
        clusters = min(1 + share, len(torch.unique(gate[rows], dim=0)))
        labels = torch.from_numpy(KMeans(clusters, n_init=4, random_state=seed).fit_predict(gate[rows].numpy())).long()
        for cluster in range(clusters):
            members = rows[labels == cluster]
            assigned[members] = len(means)
            means.append(gate[members].mean(dim=0))
    return assigned, torch.stack(means)
