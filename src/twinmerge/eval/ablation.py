"""Compares routers on their own: features, methods and numbers of inputs, each scored on test rows."""

import time

import numpy as np
import torch
from torch import Tensor

from twinmerge.eval.metrics import expected_calibration_error, reliability
from twinmerge.eval.results import RouterResult
from twinmerge.eval.seed import SeedRun
from twinmerge.hf.inputs import ids_of
from twinmerge.jobs.build import router_features, sampled
from twinmerge.jobs.checks import router_rows
from twinmerge.routing.router import fit_router
from twinmerge.twin.features import Features, Layers

INPUTS_PER_EXPERT = (1000, 100, 10)


def router_ablation(at: SeedRun) -> list[RouterResult]:
    """Fit one router for each variant on the suite's shared expert and score it on test rows; nothing is chosen here.

    All features are computed once and variants take their layers of them.
    """
    started, settings, model = time.monotonic(), at.suite.router, at.reference.model
    rows, test = sampled(router_rows(at.plan), settings, at.seed), [row for _, row in at.test]
    with at.autocast():
        features = router_features(model, {**rows, "": test}, Layers("all"), at.progress)
    ids = {name: ids_of(model, part) for name, part in {**rows, "": test}.items()}
    test_features, test_ids, size = features.pop(""), ids.pop(""), model.backbone.config.hidden_size
    layers = test_features.shape[1] // size - 1
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
        wanted = looked.layers or Layers("all")
        taken = {name: slice_features(part, wanted, size) for name, part in features.items()}
        router = fit_router(taken if looked.layers else None, chosen, seed=at.seed, ids=ids if looked.tokens else None)

        def of_test(rows: Tensor | None, layers: Layers = wanted) -> Tensor:
            return slice_features(test_features if rows is None else test_features[rows], layers, size)

        routing = router.decide(test_ids if looked.tokens else None, of_test)
        plain = (routing.router_logits / router.temperature).softmax(dim=1)
        gate = torch.where(routing.fallback[:, None], plain, routing.gate)
        confidence, picked = gate.max(dim=1)
        correct = (picked == labels).numpy()
        certain = confidence.double().numpy().astype(np.float64)
        found.append(
            RouterResult(
                features=words,
                method=method,
                inputs_per_expert=router.report["inputs_per_expert"],
                seed=at.seed,
                accuracy=float(correct.mean()),
                held_out_accuracy=router.report["accuracy"],
                calibration_error=expected_calibration_error(certain, correct),
                nbytes=sum(tensor.nbytes for tensor in router.state_dict().values()),
                seconds=time.monotonic() - started + feature_seconds,
                reliability=reliability(certain, correct),
            )
        )
        at.progress("routers", index + 1, len(variants))
    return found


def slice_features(features: Tensor, layers: Layers, size: int) -> Tensor:
    """Columns of features `all` (rows, (layers + 1) * size) that belong to some layers."""
    states = features.reshape(len(features), -1, size)
    return states[:, layers.among(states.shape[1])].flatten(1)
