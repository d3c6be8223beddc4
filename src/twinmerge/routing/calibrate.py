"""Makes router logits mean what they say: weighted loss, temperatures, calibration error, a cascade's certainty."""

import torch
from torch import Tensor, nn

CONFUSED = 0.02
"""From this share of inputs sent to each other, experts are hard to tell apart."""
_BINS = 15
_CASCADE_LOSS = 0.001
"""Share of the held-out inputs that a cascade may send wrong beyond what full features would."""


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy of (row, expert) logits, each row counted by its weight."""
    return (nn.functional.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()


def best_temperature(logits: Tensor, labels: Tensor, weights: Tensor) -> float:
    """The temperature with the lowest cross-entropy, on a logarithmic grid refined twice."""
    low, high = -5.0, 5.0
    best = 0.0
    for _ in range(3):
        grid = torch.linspace(low, high, 41)
        losses = [float(cross_entropy(logits / float(t.exp()), labels, weights)) for t in grid]
        best = float(grid[min(range(len(losses)), key=losses.__getitem__)])
        step = (high - low) / 40
        low, high = best - step, best + step
    return float(torch.tensor(best).exp())


def calibration_error(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> float:
    """Expected calibration error: mean gap of confidence and accuracy over 15 equal bins (arXiv:1706.04599).

    Args:
        confidence: (row,) probability given to the answer, 0 to 1.
        correct: (row,) whether the answer was right.
        weights: (row,) what each row counts; None counts all the same.
    """
    share = torch.ones_like(confidence) if weights is None else weights.to(confidence)
    share = share / share.sum()
    bins = (confidence * _BINS).long().clamp(max=_BINS - 1)
    gaps = torch.zeros(_BINS, dtype=confidence.dtype).index_add_(0, bins, share * (confidence - correct.to(confidence)))
    return float(gaps.abs().sum())


def confusion(chosen: Tensor, labels: Tensor, experts: int) -> Tensor:
    """(expert, expert): the share of the first's inputs (row,) that the second was chosen for; rows sum to 1."""
    counts = torch.bincount(labels * experts + chosen, minlength=experts**2).reshape(experts, experts).float()
    return counts / counts.sum(dim=1, keepdim=True).clamp_min(1)


def confused_pairs(shares: Tensor) -> list[tuple[int, int]]:
    """Pairs of experts that are hard to tell apart, by `confusion`, those hardest first.

    At least `CONFUSED` of their inputs are sent to the wrong one of both, in the mean of both directions.
    """
    both = (shares + shares.T) / 2
    pairs = [(a, b) for a in range(len(both)) for b in range(a + 1, len(both)) if both[a, b] >= CONFUSED]
    return sorted(pairs, key=lambda pair: -float(both[pair]))


def confusable_groups(shares: Tensor) -> Tensor:
    """(expert,): the number of each expert's group, experts being in one group that are hard to tell apart."""
    groups = torch.arange(len(shares))
    for a, b in confused_pairs(shares):
        groups[groups == groups[b]] = groups[a].clone()
    return groups


def least_certainty(first: Tensor, full: Tensor, labels: Tensor) -> Tensor:
    """The lowest confidence of tokens alone (row, expert) that, trusted, costs at most `_CASCADE_LOSS`.

    Counted from the most certain input on: how many more are wrong by tokens than by full features.
    """
    confidence, order = first.amax(dim=1).sort(descending=True, stable=True)
    wrong_first, wrong_full = (scores.argmax(dim=1) != labels for scores in (first, full))
    more_wrong = (wrong_first[order].long() - wrong_full[order].long()).cumsum(0)
    allowed = (more_wrong <= _CASCADE_LOSS * len(labels)).nonzero()[:, 0]
    return confidence[allowed[-1]] if len(allowed) else torch.tensor(float("inf"))
