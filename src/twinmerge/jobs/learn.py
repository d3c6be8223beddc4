"""Learns a merge's coefficients on unlabelled inputs of all experts, step by step, so that it can be gone on with."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.hashes import sha256_of
from twinmerge.files.progress import Progress, silent
from twinmerge.files.rows import Row
from twinmerge.files.target import Folder
from twinmerge.files.writer import save_tensors
from twinmerge.hf.entropy import Mixture
from twinmerge.hf.inputs import tokenize
from twinmerge.hf.measurements import Inputs, Subject
from twinmerge.merging.adamerging import ENTROPY, AdaMerging

LOG = "adamerging.json"
"""In the folder of what was merged: coefficients by expert and parameter, and the entropy before every step."""
_EVERY = 20
"""Steps after which what was learned so far is kept."""


@dataclass(frozen=True)
class Learning:
    """Everything that learning needs, checked before any work."""

    method: AdaMerging
    rows: Mapping[str, Sequence[Row]]
    load: Callable[[str], Subject]
    """Gives an expert; all are in memory at once."""
    base: Callable[[str], Tensor]
    """Gives a parameter of the base."""
    seed: int
    entries: int
    """Of the base."""

    def record(self) -> dict[str, Any]:
        """What a plan says of it."""
        rows = {name: len(part) for name, part in self.rows.items()}
        held = 2 * len(rows) + 3  # experts, task vectors, base, merged, gradients: while experts are taken apart
        memory = 4 * self.entries * held
        return {"measurement": ENTROPY, "calibration_rows": rows, "learning_memory_bytes": memory}

    def measure(self, target: Folder, progress: Progress = silent) -> dict[str, Checkpoint]:
        """Learn the coefficients; what an interrupted run learned is verified and gone on with.

        Returns:
            By expert, a number for each parameter.
        """
        names, state = sorted(self.rows), target.work / f"{ENTROPY}.safetensors"
        mixture = Mixture([self.load(name) for name in names], self.base, self.method)
        entropies: list[float] = []
        if state.exists() and target.finished.get(ENTROPY) == sha256_of(state):
            found = Checkpoint.open(state)
            mixture.go_on({name: found.read(name) for name in found.specs})
            entropies = found.read("entropies").tolist()
        while len(entropies) < self.method.steps:
            entropies.append(mixture.step(self._batches(mixture, len(entropies))))
            progress("learning coefficients", len(entropies), self.method.steps)
            if len(entropies) % _EVERY == 0 or len(entropies) == self.method.steps:
                kept = {**mixture.state(), "entropies": torch.tensor(entropies, dtype=torch.float64)}
                save_tensors({name: value.reshape(value.shape or (1,)) for name, value in kept.items()}, state)
                target.record(ENTROPY, sha256_of(state))
        measured, log = {}, {}
        for place, (name, coefficients) in enumerate(mixture.learned().items()):
            path = target.work / f"{ENTROPY}-{place}.safetensors"
            save_tensors(coefficients, path)
            measured[name] = Checkpoint(target.work, Checkpoint.open(path).specs, {})
            log[name] = {parameter: float(value) for parameter, value in coefficients.items()}
        content = json.dumps({"coefficients": log, "entropies": entropies}, indent=1)
        (target.folder / LOG).write_text(content + "\n", encoding="utf-8")
        return measured

    def _batches(self, mixture: Mixture, step: int) -> dict[str, list[Inputs]]:
        """Two batches of every expert, other ones at each step."""
        found: dict[str, list[Inputs]] = {}
        for name, rows in self.rows.items():
            size = min(self.method.batch, len(rows))
            draw = random.Random(f"{self.seed} {step} {name}")
            model = mixture.subjects[name].model
            found[name] = [tokenize(model, draw.sample(list(rows), size)) for _ in range(2)]
        return found
