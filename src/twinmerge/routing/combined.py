"""Puts scorers together: tokens beside hidden states, before them where they are certain, or as a first guess."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twinmerge.routing.calibrate import best_temperature, cross_entropy, least_certainty
from twinmerge.routing.hidden import HEADS, Hidden
from twinmerge.routing.router import Batch, Examples, Router, Routing, Scorer
from twinmerge.routing.tokens import NgramHead, Tokens
from twinmerge.twin.recipe import RouterSettings

_SHARES = tuple(2.0**power for power in range(-4, 6))


class Sum(Scorer):
    """Logits of hidden states and, times `share`, of tokens; strange is what is strange to the hidden states."""

    share: Tensor

    def __init__(self, hidden: Hidden, tokens: Tokens) -> None:
        """Put two scorers side by side."""
        super().__init__()
        self.hidden = hidden
        self.tokens = tokens
        self.register_buffer("share", torch.ones(()))

    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits, and the distance of the hidden states."""
        logits, distance = self.hidden.score(batch)
        return logits + self.share * self.tokens.score(batch)[0], distance

    def fit(self, training: Examples, held_out: Examples, settings: RouterSettings) -> None:
        """Fit both; the share has the lowest held-out loss, each at its best temperature."""
        self.tokens.fit(training, held_out, settings)
        self.hidden.fit(training, held_out, settings)
        labels, weights = held_out.labels, held_out.weights
        states, tokens = (part.score(held_out.batch)[0].detach() for part in (self.hidden, self.tokens))

        def loss(share: float) -> float:
            logits = states + share * tokens
            return float(cross_entropy(logits / best_temperature(logits, labels, weights), labels, weights))

        self.share = torch.tensor(min(_SHARES, key=loss))

    def refit(self, everything: Examples) -> None:
        """Fit both once more."""
        self.hidden.refit(everything)
        self.tokens.refit(everything)


class Cascade(Router):
    """Tokens decide; inputs of which they are not certain are looked at whole.

    `first_temperature` is that of tokens alone; from `certainty` on they are trusted.
    """

    scorer: Sum
    first_temperature: Tensor
    certainty: Tensor

    def __init__(self, expert_names: Sequence[str], settings: RouterSettings, scorer: Sum) -> None:
        """Make an uncalibrated cascade; see `Router`."""
        super().__init__(expert_names, settings, scorer)
        self.register_buffer("first_temperature", torch.ones(()))
        self.register_buffer("certainty", torch.tensor(float("inf")))

    @torch.no_grad()
    def route(self, batch: Batch) -> Routing:
        """Route by tokens, then the rows in doubt by everything."""
        first = self._first(batch)
        rows = (first.probability.amax(dim=1) < self.certainty).nonzero()[:, 0]
        return first.overlaid(rows, super().route(batch.take(rows))) if len(rows) else first

    @torch.no_grad()
    def calibrate(self, held_out: Examples) -> dict[str, float]:
        """Fit the least certainty that costs next to nothing; report the share of inputs that are looked at twice."""
        super().calibrate(held_out)
        logits = self.scorer.tokens.score(held_out.batch)[0]
        self.first_temperature = torch.tensor(best_temperature(logits, held_out.labels, held_out.weights))
        first = self._first(held_out.batch).probability
        self.certainty = least_certainty(first, super().route(held_out.batch).probability, held_out.labels)
        return {"second_look": float((first.amax(dim=1) < self.certainty).float().mean())}

    def _first(self, batch: Batch) -> Routing:
        logits, strange = self.scorer.tokens.score(batch)
        return self._routing(logits, self.first_temperature, torch.zeros_like(strange, dtype=torch.bool))


class Speculative(Router):
    """Tokens guess an expert; hidden states of the pass under its gate, with the tokens, say which is right.

    Where the guess is right, that pass is the answer; the other inputs run again. What hidden states say is learned
    under guesses that tokens make of inputs they have not seen (`fit`): others would teach to trust every guess.
    """

    scorer: Sum

    def look(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits, and the distance of the hidden states, under the gates of the guessed experts."""
        tokens, _ = self.scorer.tokens.score(batch)
        gate = nn.functional.one_hot(tokens.argmax(dim=1), tokens.shape[1]).to(tokens)
        logits, distance = self.scorer.hidden.score(batch, gate)
        return logits + self.scorer.share * tokens, distance

    def calibrate(self, held_out: Examples) -> dict[str, float]:
        """As `Router.calibrate`; report the share of inputs that run again."""
        super().calibrate(held_out)
        routing, guess = self.route(held_out.batch), self.scorer.tokens.score(held_out.batch)[0].argmax(dim=1)
        return {"second_look": float((routing.fallback | (routing.expert != guess)).float().mean())}


def assemble(
    expert_names: Sequence[str],
    settings: RouterSettings,
    *,
    feature_size: int = 0,
    stored_rows: int = 0,
    ngrams: int = 0,
) -> Router:
    """An untrained router of the kind that settings ask for.

    Args:
        expert_names: the gate's columns.
        settings: method, features and form of the gate.
        feature_size: numbers that an input's hidden states have, 0 if it looks at none.
        stored_rows: inputs that `knn` keeps.
        ngrams: n-grams that it knows.
    """
    looked, experts = settings.features, len(expert_names)
    tokens = Tokens(NgramHead(experts, ngrams))
    if looked.layers is None:
        return Router(expert_names, settings, tokens)
    sizes = {"rows": stored_rows} if settings.method == "knn" else {}
    hidden = Hidden(looked.layers, HEADS[settings.method](feature_size, experts, **sizes), feature_size, experts)
    if not looked.tokens:
        return Router(expert_names, settings, hidden)
    kinds = {"sum": Router, "cascade": Cascade, "speculative": Speculative}
    return kinds[looked.form](expert_names, settings, Sum(hidden, tokens))
