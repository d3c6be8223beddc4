"""How much of the experts is kept per byte: plain and weighed directions, in 16, 8 and 4 bits, at equal budgets.

Expected: at every budget 4 bits beat 8, and 8 beat 16, as the ranks that fit outweigh what rounding takes; weighing
directions by inputs and gradients (METHOD, section 3) adds to that, most where the budget is small.

Each cell is what `build` keeps (same ranks, same rounding), its experts made whole one after the other, gate and head
given: the normalized score with its 95 % interval over seeds and rows, and how often twin and expert say the same.
Protocol: oracle head, true gate.

With `--refit STEPS` the factors of an expert then learn together, by gradients on its unlabelled router rows, to say
what the expert says, before they are rounded.

    python -m benchmarks.bench_exclusive suites/text/text8.yaml --rows 500 [--seeds 0 1 2] [--budgets 0.03 0.06]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from twinmerge.eval.results import Predictions, TaskPredictions
from twinmerge.eval.scores import normalized_interval
from twinmerge.eval.seed import SeedRun, inputs_of
from twinmerge.eval.suite import Suite
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.target import durable_folder
from twinmerge.hf.answers import label_of
from twinmerge.hf.heads import answered, load_head
from twinmerge.hf.inputs import tokenized_batches
from twinmerge.hf.loading import backbone_from, load_tokenizer
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import open_plan
from twinmerge.jobs.measure import for_weighting
from twinmerge.jobs.preflight import checked, router_rows
from twinmerge.merging.statistics import Statistics
from twinmerge.tensors.float8 import to_eight_bits
from twinmerge.tensors.int4 import to_four_bits
from twinmerge.tensors.low_rank import LowRank
from twinmerge.tensors.whitening import Whitening
from twinmerge.twin.plan import MATRICES, Plan
from twinmerge.twin.ranks import Key, choose_ranks, compress
from twinmerge.twin.recipe import ExclusiveSettings
from twinmerge.twin.shared import merge_parameter
from twinmerge.twin.weighting import Weighting

BUDGETS = (0.02, 0.03, 0.05, 0.06, 0.12, 0.24)
DTYPES = {16: "float16", 8: "float8_e4m3fn", 4: "int4"}
_RATE, _BATCH = 1e-4, 32
"""Of refitting."""
WEIGHTINGS = ("none", "inputs", "two_sided")


@dataclass(frozen=True)
class Cell:
    """One contestant."""

    weighting: str
    bits: int
    budget: float

    def __str__(self) -> str:
        """For the progress."""
        return f"{self.weighting}, {self.bits} bits, {self.budget}x"


class Seed:
    """The experts of one seed, their shared expert, and every direction of what it loses."""

    def __init__(self, suite: Suite, seed: int, weightings: list[str], split: str, refit: int = 0) -> None:
        self.refit = refit
        self.run = SeedRun(suite, seed, lambda *_: None)
        tasks = self.run.tasks
        self.rows = {
            n: task.test if split == "test" else task.validation[: suite.test_rows] for n, task in tasks.items()
        }
        self.plan = self.planned("none", 16, 1.0)
        self.shared: dict[str, Tensor] = {}
        self.vectors: dict[Key, Tensor] = {}
        self.sides: dict[str, dict[Key, Whitening | None]] = {weighting: {} for weighting in weightings}
        self.pairs: dict[str, dict[Key, LowRank]] = {weighting: {} for weighting in weightings}
        self.spectra: dict[str, dict[Key, Tensor]] = {weighting: {} for weighting in weightings}
        with tempfile.TemporaryDirectory() as folder:
            measured = {w: self._measured(w, Path(folder) / w) for w in weightings if w != "none"}
            for task in self.plan.tasks:
                self.shared[task.name], _ = merge_parameter(task, self.plan, Statistics())
                base = self.plan.base.read(task.name)
                for name in task.experts if task.exclusive else ():
                    own = self.plan.experts[name].task_vector(task.name, base)
                    difference = own + (base - self.shared[task.name])
                    if task.kind not in MATRICES:
                        self.vectors[task.name, name] = difference.half().float()
                        continue
                    for weighting in weightings:
                        by = (
                            measured[weighting].of(name, task.name, task.matrix_shape)
                            if weighting in measured
                            else None
                        )
                        pair, spectrum = compress(
                            difference, ExclusiveSettings(budget=1.0), seed=0, expert=name, name=task.name, whitening=by
                        )
                        key = task.name, name
                        self.sides[weighting][key], self.pairs[weighting][key] = by, cast(LowRank, pair)
                        self.spectra[weighting][key] = cast(Tensor, spectrum)
        experts = self.plan.experts
        heads = {n: load_head(e.config, {k: v.float() for k, v in e.read_head().items()}) for n, e in experts.items()}
        self.model = TwinModel(
            backbone_from(self.plan.base, self.shared),
            {name: {} for name in experts},
            heads=heads,
            tokenizer=load_tokenizer(self.plan.base.path),
            max_length=suite.max_length,
        )
        self.expert_logits = {name: self._logits(name, self.run.body(name)) for name in self.run.tasks}

    def planned(self, weighting: str, bits: int, budget: float) -> Plan:
        """The plan of a build with these settings."""
        exclusive = ExclusiveSettings.model_validate({"budget": budget, "dtype": DTYPES[bits], "weighting": weighting})
        recipe = self.run.suite.recipe(self.run.suite.shared, exclusive, None, self.run.seed)
        return open_plan(recipe)

    def _measured(self, weighting: str, folder: Path) -> Weighting:
        calibration = for_weighting(checked(self.planned(weighting, 4, 1.0)), 4 * 10**9)
        assert calibration is not None
        found = {}
        folder.mkdir()
        with durable_folder(folder / "out", {}) as target:
            started = time.perf_counter()
            measured = calibration.measure(target)
            print(f"{weighting}: measured in {time.perf_counter() - started:.1f} s", flush=True)
            for name, checkpoint in measured.items():
                files = {spec.file for spec in checkpoint.specs.values()}
                for file in files:
                    file.rename(folder / file.name)
                specs = {
                    name: spec for file in files for name, spec in Checkpoint.open(folder / file.name).specs.items()
                }
                found[name] = Checkpoint(folder, specs, {})
        return Weighting(found)

    def _logits(self, name: str, body: Any) -> Tensor:
        """(row, class) of a task's test rows, by its head on an encoder."""
        rows = inputs_of(self.rows[name])
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for places, inputs in tokenized_batches(self.model, rows):
            with self.run.autocast(), torch.inference_mode():
                outputs = body(**self.model.asked(inputs), return_dict=True)
                answered = self.model.answer(outputs, [name] * len(places), **inputs)
            for place, logits in zip(places, answered, strict=True):
                found[place] = logits.float()
        return torch.stack(found)

    def _labels(self, name: str, logits: Tensor) -> list[str]:
        config: Any = self.model.heads[name].config
        return [label_of(config, index) for index in logits.argmax(dim=1).tolist()]

    def refitted(self, name: str, state: Mapping[str, Tensor], pairs: Mapping[str, LowRank]) -> dict[str, LowRank]:
        """Factors by parameter after `refit` steps of Adam on the KL divergence to the expert, on unlabelled inputs.

        Args:
            name: of the expert.
            state: of the twin's backbone without the factors.
            pairs: before.
        """
        if not self.refit:
            return dict(pairs)
        model = backbone_from(self.plan.base, dict(state)).requires_grad_(False)
        expert, head = self.run.body(name), self.model.heads[name]
        learnt = {
            key: (pair.up.clone().requires_grad_(), pair.down.clone().requires_grad_()) for key, pair in pairs.items()
        }
        rows = router_rows(self.plan)[name]
        optimizer = torch.optim.Adam([factor for both in learnt.values() for factor in both], lr=_RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.refit)
        order = torch.Generator().manual_seed(self.run.seed)
        prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
        for _ in range(self.refit):
            picked = [rows[place] for place in torch.randint(len(rows), (_BATCH,), generator=order).tolist()]
            for _, inputs in tokenized_batches(self.model, picked):
                with torch.no_grad():
                    said = answered(head, expert(**inputs, return_dict=True), inputs).log_softmax(dim=-1)
                moved = {key: state[key] + (up @ down).view(state[key].shape) for key, (up, down) in learnt.items()}
                moved = {key.removeprefix(prefix): value for key, value in moved.items()}
                outputs = torch.func.functional_call(model.base_model, moved, kwargs={**inputs, "return_dict": True})
                ours = answered(head, outputs, inputs).log_softmax(dim=-1)
                loss = nn.functional.kl_div(ours, said, reduction="batchmean", log_target=True)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
                optimizer.step()
            schedule.step()
        return {key: LowRank(up.detach(), down.detach()) for key, (up, down) in learnt.items()}

    def predictions(self, cell: Cell) -> tuple[Predictions, dict[str, float], dict[str, float]]:
        """What a twin says under true gates; by task, how often the expert says the same, and KL to the expert."""
        plan = self.planned(cell.weighting, cell.bits, cell.budget)
        cost = {task.name: plan.direction_bytes(task) for task in plan.tasks if task.kind in MATRICES}
        spectra = self.spectra[cell.weighting]
        ranks = choose_ranks(spectra, plan.recipe.exclusive, budget_bytes=plan.budget_bytes, cost=cost)
        tasks, same, apart = {}, {}, {}
        for name, task in self.run.tasks.items():
            state = dict(self.shared)
            for (tensor, owner), vector in self.vectors.items():
                if owner == name:
                    state[tensor] = state[tensor] + vector
            pairs = self.pairs[cell.weighting].items()
            cut = {key[0]: pair.truncate(ranks[key]) for key, pair in pairs if key[1] == name and ranks[key]}
            for tensor, pair in self.refitted(name, state, cut).items():
                part = _rounded(pair, cell.bits, self.sides[cell.weighting][tensor, name])
                state[tensor] = state[tensor] + part.dense().view(state[tensor].shape)
            body = backbone_from(plan.base, state).base_model
            logits, expert = self._logits(name, body), self.expert_logits[name]
            answers, own = self._labels(name, logits), self._labels(name, expert)
            same[name] = float((logits.argmax(dim=1) == expert.argmax(dim=1)).float().mean())
            apart[name] = float(
                nn.functional.kl_div(
                    logits.log_softmax(dim=1), expert.log_softmax(dim=1), reduction="batchmean", log_target=True
                )
            )
            tasks[name] = TaskPredictions(
                metric=task.spec.metric,
                positive_label=task.spec.positive_label,
                labels=[row["label"] for row in self.rows[name]],
                routed=None,
                oracle_head=answers,
                expert=own,
            )
        return Predictions(contestant="cell", seed=self.run.seed, tasks=tasks), same, apart


def _rounded(pair: LowRank, bits: int, whitening: Whitening | None) -> LowRank:
    if bits == 16:
        return pair.to(torch.float16).to(torch.float32)
    return (to_eight_bits(pair, "it") if bits == 8 else to_four_bits(pair, whitening)).to(torch.float32)


def _cells(options: argparse.Namespace) -> Iterator[Cell]:
    for budget in options.budgets:
        for weighting in options.weightings:
            for bits in options.bits:
                yield Cell(weighting, bits, budget)


@dataclass
class Found:
    """What is known of a cell, by seed."""

    runs: list[Predictions] = field(default_factory=list)
    same: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)


def _table(results: Mapping[Cell, Found]) -> tuple[Table, list[dict[str, Any]]]:
    table, rows = Table("budget", "directions", "bits", "score", "95 %", "as the expert", "KL to it"), []
    for cell, found in results.items():
        interval = normalized_interval(found.runs, "oracle_head")
        value, low, high = (100 * number for number in (interval.value, interval.low, interval.high))
        same, apart = 100 * statistics.fmean(found.same), statistics.fmean(found.apart)
        shown = (f"{value:.2f}", f"{low:.2f}-{high:.2f}", f"{same:.2f} %", f"{apart:.5f}")
        table.add_row(f"{cell.budget}x", cell.weighting, str(cell.bits), *shown)
        numbers = {"score": value, "low": low, "high": high, "same": same, "kl": apart, "seeds": len(found.runs)}
        rows.append({**vars(cell), **numbers})
    return table, rows


def main() -> None:
    """Run the cells, seed by seed, and print what is known after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--rows", type=int, default=500, help="test rows of each task")
    parser.add_argument(
        "--split", choices=["test", "validation"], default="test", help="settings are chosen on the latter"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--bits", type=int, nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--weightings", nargs="+", choices=WEIGHTINGS, default=["none", "two_sided"])
    parser.add_argument("--refit", type=int, default=0, metavar="STEPS", help="of Adam on all factors of an expert")
    parser.add_argument("--json", type=Path, help="write the table there too")
    options = parser.parse_args()
    suite = Suite.load(options.suite).model_copy(update={"test_rows": options.rows})
    results: dict[Cell, Found] = {}
    for number in options.seeds:
        seed = Seed(suite, number, options.weightings, options.split, options.refit)
        for cell in _cells(options):
            predictions, same, apart = seed.predictions(cell)
            found = results.setdefault(cell, Found())
            found.runs.append(predictions)
            found.same.append(statistics.fmean(same.values()))
            found.apart.append(statistics.fmean(apart.values()))
            print(
                f"seed {number}: {cell}: {found.same[-1]:.2%} as the expert, KL {found.apart[-1]:.5f}; KL by task",
                end=" ",
            )
            print(", ".join(f"{name} {value:.4f}" for name, value in apart.items()), flush=True)
        table, rows = _table(results)
        Console(width=100).print(table)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
