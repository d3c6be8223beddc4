"""Fits a router on inputs that belong to known experts: split, learn, calibrate on what was held out, learn again."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twinmerge.errors import DataError
from twinmerge.routing.calibrate import calibration_error, confused_pairs, confusion
from twinmerge.routing.combined import assemble
from twinmerge.routing.router import Batch, Examples, Router, Stored
from twinmerge.routing.tokens import PADDING, NgramHead
from twinmerge.twin.recipe import RouterSettings

_FOLDS = 4
"""Beside the held-out part: tokens guess every row by a head that has not seen it."""
_WRONG_SHARE, _WRONG_WEIGHT = 0.2, 0.2
"""Rows that are looked at under a wrong gate too, and what each counts: so that a wrong guess is known by its looks."""


def fit_router(batch: Batch, owners: Sequence[str], settings: RouterSettings, *, seed: int) -> Router:
    """Fit a router on inputs that belong to known experts.

    Of each expert at most `settings.samples_per_expert` inputs are used, from anywhere among them; an expert with fewer
    counts as much as the others. Held-out inputs select and calibrate; then linear heads learn from them too, at what
    was selected. No label of any task and no test row is seen.

    Args:
        batch: router data of all experts.
        owners: the expert of every row, in any order; the gate's columns are the sorted names.
        settings: method and its parameters.
        seed: of the split, the initialisation and the order of training.

    Returns:
        A router in eval mode, with `report`: accuracy and calibration error (ECE, 15 bins) on inputs while they were
        held out, temperature, inputs used of each expert, pairs that are `confused` with the share of the first's
        inputs sent to the second and of the second's sent to the first, and what `Router.calibrate` adds.

    Raises:
        DataError: if an expert has too few inputs to hold any out, or they have no n-gram in common.
        GateError: if the batch lacks what the settings look at.
    """
    names = sorted(set(owners))
    every = torch.tensor([names.index(owner) for owner in owners])
    training, held_out = _split(every, names, settings, seed)
    rows = torch.cat([training, held_out])
    counts = torch.bincount(every[rows])
    given = Examples(batch.take(rows), every[rows], (len(rows) / (len(names) * counts))[every[rows]])
    layers = settings.features.layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        data, held = _computed(given, len(training), settings)
        size = 0 if layers is None else data.batch.hidden(layers).shape[1]
        router = assemble(names, settings, feature_size=size)
        router.scorer.fit(data.take(torch.arange(len(data.labels) - len(held.labels))), held, settings)
    router.eval()
    found = router.calibrate(held)
    routing = router.route(held.batch)
    correct = (routing.expert == held.labels).float()
    shares = confusion(routing.expert, held.labels, len(names))
    router.report = {
        "accuracy": float((correct * held.weights).sum() / held.weights.sum()),
        "calibration_error": calibration_error(routing.probability.amax(dim=1), correct, held.weights),
        "temperature": float(router.temperature),
        **found,
        "confused": [
            {"experts": [names[a], names[b]], "shares": [round(float(shares[a, b]), 4), round(float(shares[b, a]), 4)]}
            for a, b in confused_pairs(shares)
        ],
        "inputs_per_expert": int(counts.min()),
        "inputs": dict(zip(names, counts.tolist(), strict=True)),
        "held_out": len(held_out),
        "feature_size": size,
    }
    router.scorer.refit(data)
    return router


def _split(labels: Tensor, names: Sequence[str], settings: RouterSettings, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the rows to learn from and of those held out, expert by expert; the others are left out."""
    training, held_out = [], []
    for index, name in enumerate(names):
        own = (labels == index).nonzero()[:, 0]
        order = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))]
        count = min(settings.samples_per_expert, len(own))
        if count < 2:
            raise DataError(f"the router needs at least 2 inputs of every expert, found {count} of {name!r}")
        held = min(max(1, round(settings.held_out * count)), count - 1)
        held_out.append(order[:held])
        training.append(order[held:count])
    return torch.cat(training), torch.cat(held_out)


def _computed(data: Examples, learnt: int, settings: RouterSettings) -> tuple[Examples, Examples]:
    """Everything with what the router looks at, computed once; and the part of it that is held out, its end.

    Args:
        data: rows to learn from, then those held out.
        learnt: how many the former are.
        settings: what the router looks at.
    """
    looked, gate = settings.features, None
    ids = data.batch.ids if looked.tokens else None
    if looked.form == "speculative" and ids is not None:
        guess = _guesses(Examples(Stored({}, ids), data.labels, data.weights), learnt)
        experts = int(data.labels.max()) + 1
        again = torch.randperm(learnt)[: round(_WRONG_SHARE * learnt)]
        wrong = (data.labels[again] + torch.randint(1, experts, again.shape)) % experts
        order = torch.cat([torch.arange(learnt), again, torch.arange(learnt, len(ids))])
        gate = nn.functional.one_hot(torch.cat([guess[:learnt], wrong, guess[learnt:]]), experts).float()
        data, ids, learnt = data.take(order), ids[order], learnt + len(again)
        span = slice(learnt - len(again), learnt)
        ids[span] = PADDING  # tokens have learned from these rows already
        data.weights[span] *= _WRONG_WEIGHT
    features = {} if looked.layers is None else {looked.layers: data.batch.hidden(looked.layers, gate)}
    found = Examples(Stored(features, ids), data.labels, data.weights)
    return found, found.take(torch.arange(learnt, len(data.labels)))


def _guesses(data: Examples, learnt: int) -> Tensor:
    """(row,) the expert that tokens say, by heads that have not seen the row: five folds, the last one held out."""
    head = NgramHead(int(data.labels.max()) + 1)
    fold = _FOLDS * torch.ones_like(data.labels)
    fold[:learnt] = torch.arange(learnt) % _FOLDS
    head.fit(data.take((fold < _FOLDS).nonzero()[:, 0]), data.take((fold == _FOLDS).nonzero()[:, 0]))
    guess = torch.zeros_like(data.labels)
    for index in reversed(range(_FOLDS + 1)):
        rows = (fold == index).nonzero()[:, 0]
        if index < _FOLDS:
            head.refit(data.take((fold != index).nonzero()[:, 0]))
        guess[rows] = head(data.batch.ids[rows])[0].argmax(dim=1)
    return guess
