"""Compares routers on their own: features, methods and numbers of inputs, each scored on test rows."""

import time

import torch

from twinmerge.eval.metrics import reliability
from twinmerge.eval.results import RouterResult
from twinmerge.eval.seed import SeedRun
from twinmerge.hf.router_data import EncodedRows
from twinmerge.jobs.preflight import router_rows
from twinmerge.routing.calibrate import calibration_error
from twinmerge.routing.fit import fit_router
from twinmerge.routing.router import Stored
from twinmerge.twin.features import Features, Layers

INPUTS_PER_EXPERT = (1000, 100, 10)
_ALL = Layers("all")


def router_ablation(at: SeedRun) -> list[RouterResult]:
    """Fit one router for each variant on the suite's shared expert and score it on test rows; nothing is chosen here.

    All features are computed once and variants take their layers of them.
    """
    started, settings, model = time.monotonic(), at.suite.router, at.reference.model
    rows, size = router_rows(at.plan), model.backbone.config.hidden_size
    owners = [name for name, part in rows.items() for _ in part]
    known, test = (
        EncodedRows.of(model, part, at.progress)
        for part in ([row for part in rows.values() for row in part], [row for _, row in at.test])
    )
    with at.autocast():
        learnt, asked = (Stored({_ALL: part.hidden(_ALL)}, part.ids) for part in (known, test))
    layers = asked.hidden(_ALL).shape[1] // size - 1
    labels = torch.tensor([list(at.tasks).index(task) for task, _ in at.test])
    feature_seconds = time.monotonic() - started
    every = [
        "embeddings",
        *(f"layer:{k}" for k in range(1, layers)),
        "last",
        f"layers:[0,{layers // 3},{layers}]",
        "all",
    ]
    with_tokens = ("tokens", f"layers:[0,{layers // 3}]+tokens", "all+tokens", "cascade")
    variants = [("linear", spec, 1000) for spec in every]
    variants += [("mlp", spec, 1000) for spec in ("last", f"layer:{layers - 2}")]
    variants += [("linear", spec, 1000) for spec in with_tokens]
    variants += [(method, spec, 1000) for method in ("centroid", "knn") for spec in ("last", "all")]
    variants += [(method, "all", n) for method in ("linear", "centroid", "knn") for n in INPUTS_PER_EXPERT[1:]]
    variants += [("linear", spec, n) for spec in ("tokens", "all+tokens") for n in INPUTS_PER_EXPERT[1:]]
    variants += [("mlp", "last", n) for n in INPUTS_PER_EXPERT[1:]]
    found = []
    for index, (method, words, count) in enumerate(variants):
        started, looked = time.monotonic(), Features.parse(words)
        chosen = settings.model_copy(update={"method": method, "features": looked, "samples_per_expert": count})
        wanted = looked.layers or _ALL
        router = fit_router(sliced(learnt, wanted, size), owners, chosen, seed=at.seed)
        confidence, picked = router.route(sliced(asked, wanted, size)).probability.max(dim=1)
        correct = picked == labels
        found.append(
            RouterResult(
                features=words,
                method=method,
                inputs_per_expert=router.report["inputs_per_expert"],
                seed=at.seed,
                accuracy=float(correct.float().mean()),
                held_out_accuracy=router.report["accuracy"],
                calibration_error=calibration_error(confidence, correct),
                nbytes=sum(tensor.nbytes for tensor in router.state_dict().values()),
                seconds=time.monotonic() - started + feature_seconds,
                reliability=reliability(confidence.double().numpy(), correct.numpy()),
            )
        )
        at.progress("routers", index + 1, len(variants))
    return found


def sliced(stored: Stored, layers: Layers, size: int) -> Stored:
    """Of rows whose features are `all`, (layers + 1) * size numbers, those of some layers."""
    features = stored.hidden(_ALL)
    states = features.reshape(len(features), -1, size)
    return Stored({layers: states[:, layers.among(states.shape[1])].flatten(1)}, stored.tokens)
