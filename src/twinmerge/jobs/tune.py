"""Chooses the scaling of a merge on validation rows: each merged model answers them, under each expert's own head."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from twinmerge.errors import MismatchError, OutputExistsError, RecipeError
from twinmerge.files.progress import Progress, silent
from twinmerge.files.rows import Row, read_rows
from twinmerge.files.schema import load_yaml
from twinmerge.files.tables import RowFile
from twinmerge.hf.answers import LABEL
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import build, open_plan
from twinmerge.jobs.predict import predict
from twinmerge.jobs.preflight import checked
from twinmerge.merging.method import Method, Scaled
from twinmerge.merging.recipe import MergeRecipe, recipe_content, twin_keys
from twinmerge.twin.recipe import ExclusiveSettings, ExpertSource, Recipe

NEXT_TO_NOTHING = ExclusiveSettings(compression="magnitude", density=1e-9)
"""Of a twin that is asked for its shared expert only: the least to compute and keep."""


@dataclass(frozen=True)
class Tuned:
    """A scaling that was chosen."""

    method: Method
    scaling: float
    """The best; of equal ones the first that was tried."""
    scores: Mapping[float, float]
    """The mean over experts of the share of their rows answered right, by scaling."""


def choose_scaling(method: Method, scalings: Sequence[float], score: Callable[[Method], float]) -> Tuned:
    """Try scalings of a merge.

    Args:
        method: whose scaling is exchanged.
        scalings: in the order in which equal ones win.
        score: of a method with a scaling; higher is better.

    Raises:
        RecipeError: if the method has no scaling.
    """
    if not isinstance(method, Scaled):
        raise RecipeError(f"shared.method {method.method!r} has no scaling to choose")
    scores = {scaling: score(method.at(scaling)) for scaling in scalings}
    best = max(scores, key=scores.__getitem__)
    return Tuned(method.at(best), best, scores)


def tune(
    recipe: Path,
    rows: Mapping[str, Path | RowFile],
    out: Path,
    *,
    scalings: Sequence[float],
    overwrite: bool = False,
    progress: Progress = silent,
) -> Tuned:
    """Choose a recipe's scaling on labelled rows, and write the recipe with it.

    Args:
        recipe: of a twin or of a static merge, ours.
        rows: labelled validation rows of every expert; rows that a result is reported on must not be among them.
        out: the new recipe, in the folder of the old one, where its paths start.
        scalings: to be tried.
        overwrite: replace `out` if it exists.
        progress: called with (stage, done, total).

    Raises:
        RecipeError: if the recipe is no such recipe, or its method has no scaling.
        DataError: if rows cannot be read, or have no labels.
        MismatchError: if an expert is no classifier.
        OutputExistsError: if `out` exists.
    """
    found = _recipe_of(recipe)
    if out.resolve().parent != recipe.resolve().parent:
        raise RecipeError(f"--out must lie beside {recipe}, as its paths start from its folder, found {out}")
    if out.exists() and not overwrite:
        raise OutputExistsError(f"{out} exists; choose another name, or --overwrite")
    if wrong := sorted(rows.keys() ^ found.experts.keys()):
        known = ", ".join(sorted(found.experts))
        raise RecipeError(f"--rows must name a file for every expert ({known}) and no other; see {wrong[0]!r}")
    read = {name: read_rows(file, labelled=True) for name, file in rows.items()}
    _require_labels(found)

    def score(method: Method) -> float:
        asked = found.model_copy(update={"shared": method})
        with tempfile.TemporaryDirectory() as folder:
            twin = build(asked, Path(folder) / "twin", check=False, progress=progress)
            model = TwinModel.from_pretrained(twin.path)
            return sum(_accuracy(model, name, own) for name, own in read.items()) / len(read)

    tuned = choose_scaling(found.shared, scalings, score)
    _write(recipe, out, tuned)
    return tuned


def _recipe_of(path: Path) -> Recipe:
    """A twin without a router that is next to nothing but its shared expert."""
    if twin_keys(path):
        recipe = Recipe.load(path)
    else:
        static = load_yaml(path, MergeRecipe)
        if len(static.experts) < 2:
            raise RecipeError(f"{path}: experts must be two or more, found {len(static.experts)}")
        experts = {name: ExpertSource(model=source) for name, source in static.experts.items()}
        recipe = Recipe(
            base=static.base, experts=experts, shared=static.shared, router=None, root=path.resolve().parent
        )
    return recipe.model_copy(update={"exclusive": NEXT_TO_NOTHING, "router": None})


def _require_labels(recipe: Recipe) -> None:
    found = checked(open_plan(recipe))
    for name, expert in sorted(found.plan.experts.items()):
        if found.answers[name] is not LABEL or not expert.head:
            gives = found.answers[name].kind if expert.head else "nothing of its own head"
            raise MismatchError(
                f"expert {name!r} must be a classifier with a head of its own, as scalings are chosen by labels; it "
                f"gives {gives}"
            )


def _accuracy(model: TwinModel, expert: str, rows: Sequence[Row]) -> float:
    """The share of rows that the shared expert answers right under an expert's head."""
    texts = [{key: value for key, value in row.items() if key != "label"} for row in rows]
    nothing = dict.fromkeys(model.expert_names, 0.0)
    right = 0
    for row, answer in zip(rows, predict(model, texts, expert=expert, gate=nothing), strict=True):
        right += answer["label"] == row["label"]
    return right / len(rows)


def _write(recipe: Path, out: Path, tuned: Tuned) -> None:
    content = recipe_content(recipe)
    content["shared"] = {**(content.get("shared") or {}), "scaling": tuned.scaling}
    tried = ", ".join(f"{scaling:g}: {score:.4f}" for scaling, score in tuned.scores.items())
    note = f"# shared.scaling was chosen by `twinmerge tune` on validation rows; accuracy by scaling: {tried}\n"
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    out.write_text(note + text, encoding="utf-8")
