"""Runs contestants whose answers are texts: language models, merged ones and twins, each writing greedily."""

from collections.abc import Sequence

from torch import Tensor

from twinmerge.eval.contestant import Contestant, Run, accuracy, expert_bytes, weights_bytes
from twinmerge.eval.results import ContestantResult, Predictions
from twinmerge.eval.seed import ANY_ROUTER, SeedRun, said
from twinmerge.eval.suite import ContestantSpec
from twinmerge.files.rows import Row
from twinmerge.jobs.build import open_plan
from twinmerge.twin.recipe import ExclusiveSettings

SHARED_ALONE = ExclusiveSettings(rank=0, weighting="none")
"""Of a twin that is asked for its shared expert only; without a singular direction adapters stay factors."""


def run_contestant(at: SeedRun, name: str, spec: ContestantSpec) -> tuple[ContestantResult, Predictions]:
    """Run one contestant on all test rows of a seed: its result, and its predictions for paired intervals."""
    return (Writer if at.suite.writes else Contestant)(at, name, spec).run()


class Writer(Contestant):
    """One contestant at one seed, whose answers are texts; no head is picked, so both protocols are the same."""

    def run(self) -> tuple[ContestantResult, Predictions]:
        """Run it on all test rows of the seed."""
        return self._result(self._model()) if self.spec.kind == "model" else super().run()

    def _top1(self) -> Run:
        """The reference's router picks a full expert."""
        at, rows = self.at, self._rows()
        chosen, texts = at.reference.expert, [""] * len(rows)
        for name in at.tasks:
            members = [row for row, expert in enumerate(chosen) if expert == name]
            found = at.written(at.whole(at.plan, name), [rows[i] for i in members], self.stage) if members else []
            for row, text in zip(members, found, strict=True):
                texts[row] = text
        nbytes = {"shared": expert_bytes(at.plan, base=True), "router": at.reference.bytes["router"]}
        return self._run_of(texts, nbytes, chosen[: len(self.rows)])

    def _static(self) -> Run:
        """The shared expert of a twin without its exclusive parts."""
        at, merged = self.at, self.at.build(self.spec.shared, SHARED_ALONE, ANY_ROUTER)
        nobody = {next(iter(at.tasks)): 0.0}
        texts = [said(answer) for answer in at.predicted(merged.model, self._rows(), self.stage, nobody)]
        return self._run_of(texts, {"shared": merged.bytes["shared"]})

    def _model(self) -> Run:
        """One model that is there already, such as an adapter that was trained on all data."""
        at = self.at
        recipe = at.suite.recipe(at.suite.shared, SHARED_ALONE, None, at.seed)
        first = next(iter(recipe.experts))
        source = recipe.experts[first].model_copy(update={"model": self.spec.model})
        plan = open_plan(recipe.model_copy(update={"experts": {**recipe.experts, first: source}}))
        texts = at.written(at.whole(plan, first), self._rows(), self.stage)
        return self._run_of(texts, {"shared": plan.base.nbytes + weights_bytes(plan.experts[first].checkpoint.path)})

    def _twin(self) -> Run:
        at, count = self.at, len(self.rows)
        exclusive = self.spec.exclusive or SHARED_ALONE
        twin = at.twin(self.spec.shared, exclusive, self.spec.router, self.spec.router_split)
        nbytes = {part: twin.bytes[part] for part in ("shared", "exclusive", "router")}
        return self._run_of(twin.label, nbytes, twin.expert[:count], twin.gate[:count])

    def _rows(self) -> list[Row]:
        """Test rows of the tasks, then of the unseen ones."""
        return [*self.rows, *(row for _, test in self.at.unseen.values() for row in test)]

    def _run_of(
        self,
        texts: Sequence[str],
        nbytes: dict[str, int],
        expert: list[str] | None = None,
        gate: Tensor | None = None,
    ) -> Run:
        """Texts of all rows of `_rows`; those of unseen tasks count where they are the label to the letter."""
        unseen, start = {}, len(self.rows)
        for name, (_, test) in self.at.unseen.items():
            found = texts[start : start + len(test)]
            start += len(test)
            unseen[name] = accuracy(found, test)
        return Run(list(texts[: len(self.rows)]), nbytes, expert, gate, unseen)
