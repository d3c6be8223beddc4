"""Knows what a build will do before it does it: one task per parameter, checked on headers only."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from twinmerge.errors import DataError, RecipeError
from twinmerge.files.checkpoint import Checkpoint, TensorSpec
from twinmerge.files.tables import RowFile
from twinmerge.merging.method import Calibrated
from twinmerge.models.compatible import Allow, compare_configs, compare_dtypes, compare_vocabularies
from twinmerge.models.expert import open_expert, shared_model, with_labels
from twinmerge.models.match import left_out_note, require_whole
from twinmerge.models.source import Expert, Library, Model, open_model
from twinmerge.models.vocabulary import Vocabulary, vocabulary_of, widened
from twinmerge.tensors.int4 import FOUR_BITS, direction_bytes
from twinmerge.twin.recipe import Recipe

Kind = Literal["linear", "conv1d", "conv", "grouped_conv", "embedding", "vector", "table", "matrix", "values", "static"]
"""What a parameter or buffer is. Of layers with a fast gated form: Linear (out, in); transformers' Conv1D (in, out);
Conv (out, in, kh, kw); Embedding (rows, out); `vector`, 1-D. Of others: `table`, an embedding; `matrix`, two axes or
more, as (first, rest); `values`, one axis or none. `static`: an integer, which nothing merges; older twins have floats
of this kind, for which the shared expert's value serves every input."""

MATRICES = ("linear", "conv1d", "conv", "grouped_conv", "embedding", "table", "matrix")
TRANSPOSED = ("conv1d", "embedding", "table")
EMBEDDINGS = ("embedding", "table")
BATCH_STATISTICS = (".running_mean", ".running_var")
"""How the names of BatchNorm's running statistics end."""
_HEADER_ENTRY_BYTES = 160
"""Upper bound of what a tensor takes in a safetensors header beside its name."""


@dataclass(frozen=True)
class TensorTask:
    """One parameter of the base: what is merged and decomposed on its own."""

    name: str
    spec: TensorSpec
    kind: Kind
    experts: tuple[str, ...]
    """Experts that bring their own value, sorted; empty: the base's value is copied."""
    exclusive: bool
    """Whether what the shared expert loses of an expert is kept."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in*kh*kw): the shape that is decomposed."""
        return math.prod(self.spec.shape[:1]), math.prod(self.spec.shape[1:])

    @property
    def header_bytes(self) -> int:
        """At most what one stored tensor of this parameter takes in a file's header."""
        return len(self.name.encode()) + _HEADER_ENTRY_BYTES


@dataclass(frozen=True)
class Plan:
    """A recipe with its files found, opened and matched."""

    recipe: Recipe
    base: Checkpoint
    experts: Mapping[str, Expert]
    """Those of the recipe; in a twin that grows, the new one alone."""
    tasks: tuple[TensorTask, ...]
    allow: Allow = field(default_factory=Allow)
    notes: tuple[str, ...] = ()
    """Differences that were allowed."""
    fallback: tuple[str, ...] = ()
    """Parameters that experts change and no fast gated layer serves: a batch takes a pass for every distinct gate."""
    vocabulary: Vocabulary | None = None
    """Where experts have tokens of their own: what the rows of the shared expert's tables are."""

    @property
    def changed(self) -> tuple[str, ...]:
        """Parameters of which an exclusive part is kept, where some expert trains them."""
        exclusive = [task.name for task in self.tasks if task.exclusive]
        return tuple(name for name in exclusive if any(expert.trains(name) for expert in self.experts.values()))

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything the result depends on beside the recipe: weights and router data."""
        models = [Checkpoint.open(model.path) for model in (self.base, *(e.checkpoint for e in self.experts.values()))]
        weights = {spec.file for model in models for spec in model.specs.values()}
        rows = {one.path for one in (*self.recipe.router_files.values(), *self.calibration.values())}
        images = {path for folder in rows if folder.is_dir() for path in folder.rglob("*") if path.is_file()}
        return tuple(sorted({*weights, *images, *(path for path in rows if path.is_file())}))

    @property
    def calibration(self) -> dict[str, RowFile]:
        """Inputs of each expert for a merge method that measures on them: its own, or the router's."""
        method = self.recipe.shared
        given = method.calibration_data if isinstance(method, Calibrated) else {}
        if given is None:
            files = self.recipe.router_files
            if lacking := [name for name in self.recipe.experts if name not in files]:
                raise RecipeError(f"experts.{lacking[0]}.router_data is missing, and {method.method} measures on it")
            return files
        return {name: self.recipe.rows(words, f"shared.calibration_data.{name}") for name, words in given.items()}

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The gate's columns, sorted, so that the order of the recipe changes nothing."""
        return tuple(sorted(self.recipe.experts))

    @property
    def vector_bytes(self) -> int:
        """Bytes of all exclusive parts that are kept whole, headers included."""
        entries = [task for task in self.tasks if task.kind not in MATRICES and task.exclusive]
        return sum(
            (task.spec.numel * self.stored_dtype(task).itemsize + task.header_bytes) * len(task.experts)
            for task in entries
        )

    def stored_dtype(self, task: "TensorTask") -> torch.dtype:
        """What a parameter's exclusive parts are stored in; 8 and 4 bits are for factors only.

        Statistics of BatchNorm stay as they are: a small variance is what is left of two large ones.
        """
        chosen = self.recipe.exclusive.dtype
        if task.name.endswith(BATCH_STATISTICS):
            return task.spec.dtype
        if chosen in ("float8_e4m3fn", "int4") and task.kind not in MATRICES:
            return torch.float16
        if chosen == "int4":
            return FOUR_BITS
        return task.spec.dtype if chosen is None else getattr(torch, chosen)

    def direction_bytes(self, task: "TensorTask") -> int:
        """Bytes of one direction of a matrix, as it is stored."""
        dtype, (out, columns) = self.stored_dtype(task), task.matrix_shape
        return direction_bytes(out, columns) if dtype == FOUR_BITS else (out + columns) * dtype.itemsize

    @property
    def budget_bytes(self) -> int | None:
        """Bytes that the factors of the plan's experts may take together, None without a budget.

        One expert's share of the recipe's budget is the budget over the recipe's number of experts.
        """
        budget = self.recipe.exclusive.budget
        if budget is None:
            return None
        matrices = [task for task in self.tasks if task.kind in MATRICES and task.exclusive]
        headers = sum(2 * task.header_bytes * len(task.experts) for task in matrices)
        return int(budget * self.base.nbytes * self._share) - self.vector_bytes - headers

    @property
    def _share(self) -> float:
        return len(self.experts) / len(self.recipe.experts)


def weighted(plan: Plan) -> list[TensorTask]:
    """The matrices whose directions are weighed by what is measured."""
    if plan.recipe.exclusive.weighting in ("none", "auto"):
        return []
    return [task for task in plan.tasks if task.exclusive and task.kind in MATRICES]


def moment_bytes(task: TensorTask) -> int:
    """Of both second moments of a matrix, in float32; an embedding's rows have a diagonal one."""
    rows, columns = task.matrix_shape
    return 4 * ((rows if task.kind in EMBEDDINGS else rows * rows) + columns * columns)


def make_plan(
    recipe: Recipe,
    library: Library,
    kinds_of: Callable[[Model], Mapping[str, Kind]],
    only: str | None = None,
    allow: Allow = Allow(),
    shared_class: str | None = None,
) -> Plan:
    """Find, open and match every file of a recipe, and refuse what cannot become a twin.

    Args:
        recipe: what to build.
        library: knows classes; this module knows none.
        kinds_of: parameter name -> what its layer is, for the model that the shared expert is made of.
        only: the one expert of the recipe that is opened and planned for; None plans for all.
        allow: differences between base and experts that are not refused.
        shared_class: of the shared expert, if it is there already; None follows from the experts.

    Raises:
        RecipeError: if a path is missing or a budget cannot hold the dense parts.
        MismatchError: if an expert does not fit the base.
        CheckpointError: if a file cannot be read.
    """
    if only is None and (fault := recipe.shared.misfit(recipe.experts)):
        raise RecipeError(f"shared: {fault}")
    base = open_model(recipe.locate(recipe.base, "base"), library)
    folders = {
        name: recipe.locate(source.model, f"experts.{name}.model")
        for name, source in recipe.experts.items()
        if only in (None, name)
    }
    if shared_class is None:
        shared = shared_model(base, folders.values(), library)
    else:
        shared = open_model(base.checkpoint.path, library, cls=shared_class)
    require_whole("base", shared)
    kinds = kinds_of(shared)
    conv1d = {name for name, kind in kinds.items() if kind == "conv1d"}
    experts = {name: _opened(name, folder, recipe, base, shared, conv1d, library) for name, folder in folders.items()}
    for name, rows in recipe.router_files.items():
        if rows.path.is_file() and rows.path.stat().st_size == 0:
            raise DataError(
                f"experts.{name}.router_data: {rows.path} is empty; the router needs inputs of every expert"
            )
    found = shared.checkpoint
    notes = [left_out_note("base", shared.layout, shared.left_out)] if shared.left_out else []
    for name, expert in experts.items():
        path = expert.checkpoint.path
        notes += expert.notes
        notes += compare_configs(found, name, expert.checkpoint, allow)
        notes += compare_vocabularies(found.path, name, path if path.is_dir() else path.parent, allow, may_add=True)
        notes += compare_dtypes(found, name, expert.checkpoint, expert.stored)
    vocabulary, more = _vocabulary(shared, experts, library)
    if vocabulary is not None:
        found, experts = widened(found, shared.layout.vocabulary, experts, vocabulary)
    return replace(assemble(recipe, found, experts, kinds, allow, (*notes, *more)), vocabulary=vocabulary)


def _vocabulary(shared: Model, experts: Mapping[str, Expert], library: Library) -> tuple[Vocabulary | None, list[str]]:
    """Tokens that experts have of their own, and notes on them."""
    base, theirs, known = shared.checkpoint.path, dict[str, dict[str, int]](), dict[str, int]()
    for name, expert in experts.items():
        path = expert.checkpoint.path
        found = library.tokens(path if path.is_dir() else path.parent, base) if base.is_dir() else None
        if found is not None:
            known = known or library.tokens(base, path) or {}
            theirs |= {name: found} if known.items() <= found.items() else {}
    vocabulary = vocabulary_of(shared.checkpoint, shared.layout.vocabulary, experts, known, theirs)
    if vocabulary is None:
        return None, []
    return vocabulary, [
        f"{name!r}: {len(added.ids)} tokens of its own, which it alone reads and writes"
        for name, added in vocabulary.added.items()
    ]


def _opened(
    name: str, folder: Path, recipe: Recipe, base: Model, shared: Model, conv1d: set[str], library: Library
) -> Expert:
    """An expert with what the recipe says of it."""
    source = recipe.experts[name]
    head = None if source.head is None else Checkpoint.open(recipe.locate(source.head, f"experts.{name}.head"))
    expert = open_expert(name, folder, base, shared, conv1d, library, cls=source.cls, head=head)
    return expert if source.labels is None else with_labels(expert, source.labels)


def assemble(
    recipe: Recipe,
    base: Checkpoint,
    experts: Mapping[str, Expert],
    kinds: Mapping[str, Kind],
    allow: Allow = Allow(),
    notes: Sequence[str] = (),
) -> Plan:
    """Lay out what experts that fit a base become.

    Args:
        recipe: what to build.
        base: what the shared expert is made of.
        experts: matched with it.
        kinds: parameter name -> what its layer is.
        allow: differences that were not refused.
        notes: on them.

    Raises:
        RecipeError: if a budget cannot hold the dense parts.
    """
    tasks = tuple(
        _task(name, spec, kinds.get(name, "static"), experts, recipe) for name, spec in sorted(base.specs.items())
    )
    plan = Plan(recipe, base, experts, tasks, allow, tuple(notes))
    if plan.budget_bytes is not None and plan.budget_bytes < 0:
        needed = (recipe.exclusive.budget or 0) - plan.budget_bytes / base.nbytes / plan._share
        raise RecipeError(
            f"exclusive.budget: {recipe.exclusive.budget} x {base.nbytes:,} bytes cannot hold the biases and norms of "
            f"{len(recipe.experts)} experts; it must be at least {math.ceil(needed * 1e4) / 1e4}"
        )
    return plan


def _task(name: str, spec: TensorSpec, kind: Kind, experts: Mapping[str, Expert], recipe: Recipe) -> TensorTask:
    if not spec.dtype.is_floating_point:
        return TensorTask(name, spec, kind, (), False)
    with_value = [e.name for e in experts.values() if e.is_adapter or name in e.stored]  # all whose class reads it
    whole = len(experts) == len(recipe.experts)  # else others have moved the shared expert
    if whole and not any(e.trains(name) for e in experts.values()):
        with_value = []
    left = kind in EMBEDDINGS and recipe.exclusive.embeddings == "shared"
    left = left or (name.endswith(BATCH_STATISTICS) and recipe.exclusive.bn == "shared")
    exclusive = kind != "static" and not left
    return TensorTask(name, spec, kind, tuple(sorted(with_value)), exclusive and bool(with_value))
