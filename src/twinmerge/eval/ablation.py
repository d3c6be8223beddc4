"""Knows how routers are compared: features, methods and numbers of inputs, each scored on test rows."""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from twinmerge.eval.metrics import expected_calibration_error, reliability
from twinmerge.eval.results import RouterResult
from twinmerge.files.progress import Progress
from twinmerge.routing.router import Router, Routing
from twinmerge.twin.features import Features
from twinmerge.twin.recipe import RouterSettings

INPUTS_PER_EXPERT = (1000, 100, 10)


def router_ablation(
    route: Callable[[RouterSettings], tuple[Router, Routing]],
    labels: Tensor,
    layers: int,
    settings: RouterSettings,
    seed: int,
    feature_seconds: float,
    progress: Progress,
) -> list[RouterResult]:
    """Fit one router for each variant and score it on test rows; nothing is chosen here.

    Args:
        route: fits a router of the given settings and routes the test rows, and perhaps others after them.
        labels: (rows,) the expert's index of every test row.
        layers: of the model, embeddings not counted.
        settings: the suite's; method and features vary around it.
        seed: named in the results.
        feature_seconds: what computing the features took, part of each router's seconds.
        progress: called after each router.
    """
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
    for index, (method, spec, count) in enumerate(variants):
        started = time.monotonic()
        varied = {"method": method, "features": Features.parse(spec), "samples_per_expert": count}
        chosen = settings.model_copy(update=varied)
        router, routing = route(chosen)
        plain = (routing.router_logits / router.temperature).softmax(dim=1)
        gate = torch.where(routing.fallback[:, None], plain, routing.gate)[: len(labels)]
        confidence, picked = gate.max(dim=1)
        correct = (picked == labels).numpy()
        certain = confidence.double().numpy().astype(np.float64)
        found.append(
            RouterResult(
                features=spec,
                method=method,
                inputs_per_expert=router.report["inputs_per_expert"],
                seed=seed,
                accuracy=float(correct.mean()),
                held_out_accuracy=router.report["accuracy"],
                calibration_error=expected_calibration_error(certain, correct),
                nbytes=sum(tensor.nbytes for tensor in router.state_dict().values()),
                seconds=time.monotonic() - started + feature_seconds,
                reliability=reliability(certain, correct),
            )
        )
        progress("routers", index + 1, len(variants))
    return found
