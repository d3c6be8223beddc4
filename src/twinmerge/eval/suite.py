"""Reads a suite file: tasks, where their rows and experts lie, and who is compared."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from twinmerge.errors import DataError, RecipeError
from twinmerge.eval.metrics import WRITTEN
from twinmerge.eval.results import Slug
from twinmerge.files.cache import CACHE_VARIABLE, cache_folder
from twinmerge.files.rows import Row, read_rows
from twinmerge.files.schema import Strict, load_yaml
from twinmerge.merging.average import Pretrained
from twinmerge.merging.method import Method
from twinmerge.merging.per_task import PerTask
from twinmerge.runtime.precision import PrecisionChoice
from twinmerge.twin.recipe import ExclusiveSettings, ExpertSource, Recipe, RouterSettings


class TaskSpec(Strict):
    """How a task is judged: by a metric, `f1` being that of the class `positive_label`.

    `exact_match` and `chrf` are of texts that language models write; the label is the right one.
    """

    metric: Literal["accuracy", "f1", "macro_f1", "exact_match", "chrf"] = "accuracy"
    positive_label: str | None = None

    @model_validator(mode="after")
    def _label_of_f1(self) -> "TaskSpec":
        if (self.metric == "f1") != (self.positive_label is not None):
            found = f"{self.metric} with {self.positive_label!r}"
            raise ValueError(f"metric f1, and only that one, needs a positive_label; found metric {found}")
        return self


@dataclass(frozen=True)
class Task:
    """One task at one seed.

    Attributes:
        name: the key of its scores everywhere.
        spec: how it is judged.
        validation: labelled rows that settings may be chosen on.
        test: labelled rows that nothing is chosen on.
    """

    name: str
    spec: TaskSpec
    validation: list[Row]
    test: list[Row]


class UnseenSpec(Strict):
    """A task that no expert was trained on, scored by accuracy.

    Attributes:
        head: the expert whose head answers, its labels being the task's; None fits a logistic regression on the
            backbone's pooled output for the task's validation rows.
    """

    head: str | None = None


class ContestantSpec(Strict):
    """Something that predicts rows.

    Attributes:
        title: for people.
        kind: `experts` (each on its own task), `top1` (the router picks a full expert), `static` (one merged model),
            `per_task` (the task's name picks weights that its method makes for it), `twin`, or `model` (one language
            model, or adapter of it, that is there already).
        model: of kind `model`: its folder.
        shared: how the merged model or the shared expert is made.
        scalings: of `shared`; the best on validation rows is taken.
        thresholds: of `shared` of kind `per_task`; the best for each task on its validation rows is taken.
        exclusive: of a twin.
        router: of this contestant alone; None takes the suite's.
        router_split: the rows that a twin's router is fitted on; only their texts are used.
        groups: group-wise mode of the paper with that many merged models.
        seeds: run at these seeds only; None runs at all.
    """

    title: str
    kind: Literal["experts", "top1", "static", "per_task", "twin", "model"]
    model: str | None = None
    shared: Method = Pretrained()
    scalings: list[float] | None = None
    thresholds: Annotated[list[float], Field(min_length=1)] | None = None
    exclusive: ExclusiveSettings | None = None
    router: RouterSettings | None = None
    router_split: Slug = "router"
    groups: Annotated[int, Field(ge=1)] | None = None
    seeds: list[int] | None = None

    @model_validator(mode="after")
    def _fits_kind(self) -> "ContestantSpec":
        if (self.kind == "twin") != (self.exclusive is not None):
            raise ValueError(f"exclusive belongs to kind twin, and only to it; found kind {self.kind}")
        if self.scalings is not None and (self.kind != "static" or not hasattr(self.shared, "scaling")):
            raise ValueError("scalings belong to kind static with a method that has a scaling")
        if (self.kind == "per_task") != isinstance(self.shared, PerTask):
            raise ValueError(
                "a method that makes a model for each task, as emr, is for kind per_task, and only it is; "
                f"found kind {self.kind} with {self.shared.method}"
            )
        if self.thresholds is not None and not hasattr(self.shared, "threshold"):
            raise ValueError(f"thresholds belong to a method that has a threshold, found {self.shared.method}")
        if (self.kind == "model") != (self.model is not None):
            raise ValueError(f"model belongs to kind model, and only to it; found kind {self.kind}")
        return self


class Suite(Strict):
    """A suite file; see docs/recipe.md.

    Attributes:
        name: of the suite.
        root: folder that the other paths start from; `{seed}` stands for the seed, `$TWINMERGE_CACHE` is known
            (default ~/.cache/twinmerge).
        base: the base model.
        base_title: its name in the report; None takes the folder's.
        experts: `{task}` stands for the task.
        data: rows; `{task}` and `{split}` (train, validation, router, test, others that contestants name) stand for
            themselves.
        unseen_data: rows of unseen tasks.
        tasks: judged tasks, one expert each.
        unseen: tasks without an expert.
        unseen_rows: test rows of each unseen task that are used, the first ones.
        validation_rows: of each task, to choose scalings on.
        test_rows: of each task, the first ones; None is all.
        max_length: tokens an input is cut at.
        max_new_tokens: that language models write, at most.
        precision: of the matrix products of every contestant alike; bfloat16 is autocast, weights stay as they are;
            auto is the faster of the two on this machine.
        shared: of the suite's router: the shared expert whose features it sees.
        router: picks head and gate of every contestant without a router of its own.
        router_ablation: whether features, methods and numbers of inputs are compared, at the first seed.
        seeds: runs to make.
        contestants: in the order they are shown.
        sources: citations.
    """

    name: Slug
    root: str
    base: str
    base_title: str | None = None
    experts: str = "experts/{task}"
    data: str = "data/{task}.{split}.jsonl"
    unseen_data: str = "unseen/{task}.{split}.jsonl"
    tasks: dict[Slug, TaskSpec]
    unseen: dict[Slug, UnseenSpec] = {}
    unseen_rows: Annotated[int, Field(ge=1)] = 500
    validation_rows: Annotated[int, Field(ge=1)] = 200
    test_rows: Annotated[int, Field(ge=1)] | None = None
    max_length: int | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] = 16
    precision: PrecisionChoice = "float32"
    shared: Method
    router: RouterSettings = RouterSettings()
    router_ablation: bool = False
    seeds: list[int] = [0]
    contestants: dict[Slug, ContestantSpec]
    sources: list[str] = []
    folder: Path = Path()

    @field_validator("tasks")
    @classmethod
    def _two_tasks(cls, tasks: dict[str, TaskSpec]) -> dict[str, TaskSpec]:
        if len(tasks) < 2:
            raise ValueError(f"a suite needs at least two tasks, found {len(tasks)}")
        return tasks

    @model_validator(mode="after")
    def _fitting_methods(self) -> "Suite":
        others = {f"contestants.{name}.shared": self.method_of(spec) for name, spec in self.contestants.items()}
        for where, method in {"shared": self.shared, **others}.items():
            if fault := method.misfit(self.tasks):
                raise ValueError(f"{where}: {fault}")
        return self

    @model_validator(mode="after")
    def _labels_or_texts(self) -> "Suite":
        metrics = {task.metric for task in self.tasks.values()}
        if metrics & WRITTEN and metrics - WRITTEN:
            found = ", ".join(sorted(metrics))
            raise ValueError(f"tasks are judged by labels, or all by texts (exact_match, chrf); found {found}")
        for name, spec in self.contestants.items():
            if self.writes and (spec.groups or spec.scalings or spec.kind == "per_task"):
                raise ValueError(
                    f"contestants.{name}: groups, scalings and per_task are not for texts that are written"
                )
            if spec.kind == "model" and not self.writes:
                raise ValueError(f"contestants.{name}: kind model is for texts that are written")
        return self

    def method_of(self, spec: ContestantSpec) -> Method:
        """A contestant's merge method, of one that makes a model for each task that of the first."""
        if not isinstance(spec.shared, PerTask):
            return spec.shared
        return spec.shared.model_copy(update={"task": next(iter(self.tasks))})

    @property
    def writes(self) -> bool:
        """Whether what is judged are texts that language models write."""
        return all(task.metric in WRITTEN for task in self.tasks.values())

    @classmethod
    def load(cls, path: Path | str) -> "Suite":
        """Read a suite file.

        Raises:
            RecipeError: `file:line`, what is wrong and what to do.
        """
        path = Path(path)
        suite = load_yaml(path, cls).model_copy(update={"folder": path.resolve().parent})
        for name, unseen in suite.unseen.items():
            if unseen.head is not None and unseen.head not in suite.tasks:
                raise RecipeError(f"{path}: unseen.{name}.head must be a task of the suite, found {unseen.head!r}")
        return suite

    def root_of(self, seed: int) -> Path:
        """The folder of one seed's experts and rows."""
        cache = str(cache_folder())
        root = self.root.replace("${" + CACHE_VARIABLE + "}", cache).replace("$" + CACHE_VARIABLE, cache)
        return (self.folder / Path(root.replace("{seed}", str(seed))).expanduser()).resolve()

    def task(self, name: str, seed: int) -> Task:
        """One task with its validation and test rows.

        Raises:
            DataError: if rows cannot be read, or `f1` is about a label that no test row has.
        """
        spec = self.tasks[name]
        validation, test = (self._rows(name, split, seed) for split in ("validation", "test"))
        test = test[: self.test_rows]
        if spec.positive_label is not None and all(row["label"] != spec.positive_label for row in test):
            raise DataError(f"task {name!r}: no test row has the positive_label {spec.positive_label!r}")
        return Task(name, spec, validation, test)

    def _rows(self, task: str, split: str, seed: int) -> list[Row]:
        return read_rows(self.root_of(seed) / self.data.format(task=task, split=split), labelled=True)

    def unseen_task(self, name: str, seed: int) -> tuple[list[Row], list[Row]]:
        """Validation and test rows of an unseen task; without a head the former fit the answer."""
        paths = [self.root_of(seed) / self.unseen_data.format(task=name, split=s) for s in ("validation", "test")]
        fit = read_rows(paths[0], labelled=True) if self.unseen[name].head is None and not self.writes else []
        return fit[: self.unseen_rows], read_rows(paths[1], labelled=True)[: self.unseen_rows]

    def recipe(
        self,
        shared: Method,
        exclusive: ExclusiveSettings,
        router: RouterSettings | None,
        seed: int,
        split: str = "router",
    ) -> Recipe:
        """The recipe of a contestant at a seed."""
        experts = {
            name: ExpertSource(
                model=self.experts.format(task=name), router_data=self.data.format(task=name, split=split)
            )
            for name in self.tasks
        }
        return Recipe(
            base=self.base,
            experts=experts,
            shared=shared,
            exclusive=exclusive,
            router=router or self.router,
            max_length=self.max_length,
            seed=seed,
            root=self.root_of(seed),
        )
