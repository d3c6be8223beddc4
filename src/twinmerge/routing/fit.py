"""Fits a router on inputs that belong to known experts: split, learn, calibrate on what was held out, learn again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from twinmerge.errors import DataError
from twinmerge.routing.calibrate import calibration_error
from twinmerge.routing.combined import assemble
from twinmerge.routing.router import Batch, Examples, Router, Stored
from twinmerge.twin.recipe import RouterSettings


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
        held out, temperature, inputs used of each expert, and what `Router.calibrate` adds.

    Raises:
        DataError: if an expert has too few inputs to hold any out, or they have no n-gram in common.
        GateError: if the batch lacks what the settings look at.
    """
    names = sorted(set(owners))
    every = torch.tensor([names.index(owner) for owner in owners])
    training, held_out = _split(every, names, settings, seed)
    rows = torch.cat([training, held_out])
    counts = torch.bincount(every[rows])
    data = Examples(
        _computed(batch.take(rows), settings), every[rows], (len(rows) / (len(names) * counts))[every[rows]]
    )
    learnt = data.take(torch.arange(len(training)))
    held = data.take(torch.arange(len(training), len(rows)))
    layers = settings.features.layers
    size = 0 if layers is None else data.batch.hidden(layers).shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router = assemble(names, settings, feature_size=size)
        router.scorer.fit(learnt, held, settings)
    router.eval()
    found = router.calibrate(held)
    routing = router.route(held.batch)
    correct = (routing.expert == held.labels).float()
    router.report = {
        "accuracy": float((correct * held.weights).sum() / held.weights.sum()),
        "calibration_error": calibration_error(routing.probability.amax(dim=1), correct, held.weights),
        "temperature": float(router.temperature),
        **found,
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


def _computed(batch: Batch, settings: RouterSettings) -> Stored:
    """What the router looks at, computed once."""
    looked = settings.features
    features = {} if looked.layers is None else {looked.layers: batch.hidden(looked.layers)}
    return Stored(features, batch.ids if looked.tokens else None)
