"""Adds, removes or exchanges an expert of a twin: the shared expert stays, the router is fitted anew."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from pydantic import ValidationError

from twinmerge.errors import ArtifactError, DataError, MismatchError, RecipeError
from twinmerge.files.hashes import fingerprint_of, sha256_of
from twinmerge.files.progress import Progress, silent
from twinmerge.files.tables import RowFile
from twinmerge.files.target import Folder, durable_folder
from twinmerge.hf.classes import LIBRARY
from twinmerge.hf.loading import skeleton
from twinmerge.jobs.build import finish, left_to_shared, now, versions, with_fallback, with_provenance
from twinmerge.jobs.measure import for_weighting
from twinmerge.jobs.preflight import checked
from twinmerge.jobs.recalibrate import recalibrate
from twinmerge.merging.executor import MEMORY_BYTES
from twinmerge.models.provenance import require_unchanged
from twinmerge.models.source import locate
from twinmerge.runtime.precision import PrecisionChoice, require_known
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.twin.decompose import WeightsReport, add_expert
from twinmerge.twin.manifest import (
    MANIFEST,
    ChangeRecord,
    HashedFile,
    Manifest,
    record_recipe,
    record_root,
)
from twinmerge.twin.plan import Plan, make_plan
from twinmerge.twin.recipe import ExpertSource, Recipe
from twinmerge.twin.weighting import Weighting

Change = Literal["add", "remove", "replace"]


class Options(TypedDict, total=False):
    """What `add`, `replace` and `remove` take besides.

    Attributes:
        out: write the new twin there and leave the old one as it is.
        overwrite: replace `out` if it exists.
        resume: go on with what an interrupted run of the same change left.
        root: where relative paths of the twin's recipe start now; None is where they did when it was built.
        check: try the new twin before it takes the old one's place (`jobs.check`); the default.
        precision: of the passes that the router learns from, as for `build`.
        progress: called with (stage, done, total).
    """

    out: Path | str | None
    overwrite: bool
    resume: bool
    root: Path | str | None
    check: bool
    precision: PrecisionChoice | None
    progress: Progress


def add(
    twin: Path | str, name: str, *, model: Path | str, router_data: Path | str | None = None, **options: Unpack[Options]
) -> TwinArtifact:
    """Add an expert to a twin: its exclusive part and the router are computed, every other file keeps its bits.

    What is kept of it follows the twin's `exclusive` settings; under a budget it gets as much as each of the others
    was given, and the recorded budget grows by that share.

    Args:
        twin: the twin's folder, replaced whole once the new one is complete.
        name: of the new expert.
        model: a folder or hub id, fine-tuned from the twin's base.
        router_data: JSON lines of inputs that belong to it; a twin without a router needs none.
        **options: see `Options`.

    Returns:
        The new twin.

    Raises:
        InputError: whatever is wrong with the twin, the expert or the data, in one line; nothing is changed.
    """
    return _change(twin, "add", name, _source(model, router_data), options)


def replace(
    twin: Path | str, name: str, *, model: Path | str, router_data: Path | str | None = None, **options: Unpack[Options]
) -> TwinArtifact:
    """Exchange an expert of a twin for another of the same name; see `add`."""
    return _change(twin, "replace", name, _source(model, router_data), options)


def remove(twin: Path | str, name: str, **options: Unpack[Options]) -> TwinArtifact:
    """Take an expert out of a twin; the shared expert, which was merged with it, stays. See `add`."""
    return _change(twin, "remove", name, None, options)


def _change(twin: Path | str, change: Change, name: str, source: ExpertSource | None, options: Options) -> TwinArtifact:
    require_known(options.get("precision"))
    folder = TwinArtifact.open(twin).require_model().path.resolve()
    out = Path(options.get("out") or folder).resolve()
    overwrite, resume = options.get("overwrite", False), options.get("resume", False)
    fingerprint = _fingerprint(folder, change, name, source)
    with durable_folder(out, fingerprint, overwrite=overwrite, resume=resume, in_place=out == folder) as target:
        if not target.complete:
            _fill(target, TwinArtifact.open(folder), out, change, name, source, options)
    return TwinArtifact.open(out)


def _fill(
    target: Folder,
    artifact: TwinArtifact,
    out: Path,
    change: Change,
    name: str,
    source: ExpertSource | None,
    options: Options,
) -> None:
    """Write the new twin, which will lie in `out`."""
    progress = options.get("progress", silent)
    recipe = _changed_recipe(_recipe(artifact, options.get("root")), change, name, source)
    plan = Plan(recipe, artifact.shared, {}, ()) if source is None else _plan(artifact, recipe, name)
    found = checked(plan)
    plan = found.plan
    artifact.verify()
    target.clear()
    folder, new = target.folder, target.folder / "experts" / name
    known = _take_over(artifact, folder, name, link=out == artifact.path)
    report = None
    if source is not None:
        weighting = for_weighting(found, MEMORY_BYTES)
        report = add_expert(
            plan,
            artifact.shared,
            new,
            target.work,
            progress,
            finished=dict(target.finished),
            record=target.record,
            weighting=Weighting(weighting.measure(target, progress)) if weighting else None,
        )
    found.write_own(folder)
    manifest = _manifest(artifact, out, plan, change, name, report, progress)
    written = TwinArtifact(folder, manifest)
    if source is not None and plan.recipe.exclusive.bn == "recalibrate":
        recalibrate(written, found.rows, only=name, seed=plan.recipe.seed, progress=progress)
    finish(
        written,
        found,
        known,
        check=options.get("check", True),
        precision=options.get("precision"),
        progress=progress,
    )


def _fingerprint(folder: Path, change: Change, name: str, source: ExpertSource | None) -> dict[str, object]:
    """What an interrupted change must have had in common with this one to be gone on with."""
    model = locate(Path.cwd(), source.model, "the new expert") if source else folder
    files = [
        *model.glob("*.safetensors"),
        *model.glob("*.json"),
        *([RowFile.parse(source.router_data).path] if source and source.router_data else []),
    ]
    asked = f"{change} {name}"
    return fingerprint_of(files, change=asked, twin=sha256_of(folder / MANIFEST), versions=versions())


def _source(model: Path | str, router_data: Path | str | None) -> ExpertSource:
    """Where a new expert is, as any working directory finds it again."""
    path = Path(model).expanduser()
    locate(Path.cwd(), str(model), "the new expert")
    found = str(path.resolve()) if path.exists() else str(model)
    if router_data is None:
        return ExpertSource(model=found)
    words = str(router_data)
    rows = RowFile.parse(words)
    if not rows.path.exists():
        raise DataError(
            f"the new expert's router data: {rows.path.resolve()} is not there; the router needs inputs of every expert"
        )
    if not words.startswith("hf://"):
        words = str(rows.path.resolve()) + (f"#{words.rpartition('#')[2]}" if rows.columns else "")
    return ExpertSource(model=found, router_data=words)


def _recipe(artifact: TwinArtifact, root: Path | str | None) -> Recipe:
    """The recipe that a twin was built from."""
    recorded = artifact.manifest.root
    start = Path(root) if root is not None else artifact.path / recorded if recorded is not None else None
    if start is None:
        raise ArtifactError(
            f"{artifact.path} does not say where its recipe's paths start; name that folder as root (--root)"
        )
    try:
        return Recipe.model_validate({**artifact.manifest.recipe.content(), "root": start.resolve()})
    except ValidationError as error:
        raise ArtifactError(
            f"{artifact.path / 'twin.json'} is damaged: its recipe is not valid ({error.errors()[0]['msg']})"
        ) from error


def _changed_recipe(recipe: Recipe, change: Change, name: str, source: ExpertSource | None) -> Recipe:
    """The recipe of the new twin; a budget is shared by as many experts more or fewer, each keeping its share.

    Raises:
        RecipeError: if there is no such expert, or one already, or an expert's router data is no longer there.
    """
    if change == "add" and name in recipe.experts:
        raise RecipeError(f"the twin has an expert {name!r} already; replace it, or choose another name")
    if change != "add" and name not in recipe.experts:
        raise RecipeError(f"unknown expert {name!r}; this twin has {', '.join(sorted(recipe.experts))}")
    experts = {n: s.model_dump() for n, s in recipe.experts.items() if source is not None or n != name}
    if source is not None:
        experts[name] = source.model_dump()
    exclusive = recipe.exclusive.model_dump()
    if recipe.exclusive.budget is not None:
        exclusive["budget"] = round(recipe.exclusive.budget * len(experts) / len(recipe.experts), 12)
    try:
        changed = Recipe.model_validate({**recipe.model_dump(), "experts": experts, "exclusive": exclusive})
    except ValidationError as error:
        raise RecipeError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
    for expert, entry in changed.experts.items():
        rows = RowFile.parse(entry.router_data or "", recipe.root).path
        if entry.router_data is not None and not rows.exists():
            raise RecipeError(
                f"experts.{expert}.router_data: {rows} is not there, and the router is "
                "fitted on the inputs of every expert; put it back, or name the folder that the recipe's paths start "
                "from as root (--root)"
            )
    return changed


def _plan(artifact: TwinArtifact, recipe: Recipe, name: str) -> Plan:
    """The plan for the new expert alone, which must be what the others are.

    Raises:
        MismatchError: if the base is another than the twin's, or the expert has other parameters or no head.
    """
    cls, known = artifact.shared.config["architectures"][0], artifact.manifest.vocabulary
    if known is not None:
        found = ", ".join(map(repr, known.added)) or "one that was removed"
        raise MismatchError(
            f"the twin's tables have rows for tokens of its experts ({found}), and the base has none of them: no "
            "expert can be added or replaced; build the twin anew"
        )
    plan = make_plan(recipe, LIBRARY, lambda _: artifact.kinds, only=name, shared_class=cls)
    if plan.vocabulary is not None:
        count = len(plan.vocabulary.added[name].ids)
        raise MismatchError(
            f"expert {name!r} has {count} tokens of its own, for which the twin's tables have no rows; "
            "build the twin anew"
        )
    if artifact.manifest.base.files:
        require_unchanged(artifact.manifest.base, plan.base, "base")
    others = [other for other in artifact.expert_names if other != name]
    with_head = [other for other in others if (artifact.path / "experts" / other / "head").is_dir()]
    if bool(with_head) != bool(plan.experts[name].head):
        has, lacks = (name, others[0]) if not with_head else (with_head[0], name)
        raise MismatchError(f"expert {has!r} has a head of its own, expert {lacks!r} has none; give all or none")
    return plan if artifact.manifest.fallback is None else with_fallback(plan, skeleton(artifact.path))


def _take_over(artifact: TwinArtifact, folder: Path, name: str, *, link: bool) -> dict[str, HashedFile]:
    """Bring the files that stay into the new folder, without a copy where it takes the old one's place.

    Returns:
        Their entries in the manifest.
    """
    kept = {
        file: entry
        for file, entry in artifact.manifest.files.items()
        if file != "README.md" and not file.startswith(("router/", f"experts/{name}/"))
    }
    for file in kept:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        if not (link and _linked(artifact.path / file, folder / file)):
            shutil.copyfile(artifact.path / file, folder / file)
    return kept


def _linked(old: Path, new: Path) -> bool:
    """Give a file a second name; not every file system can."""
    try:
        os.link(old, new)
    except OSError:
        return False
    return True


def _manifest(
    artifact: TwinArtifact,
    out: Path,
    plan: Plan,
    change: Change,
    name: str,
    report: WeightsReport | None,
    progress: Progress,
) -> Manifest:
    """The old manifest with one expert more, fewer or other, and a line on the change."""
    old, recipe = artifact.manifest, record_recipe(plan.recipe)
    experts = {expert: entry for expert, entry in old.experts.items() if expert != name}
    found: Mapping[str, Mapping[str, Any]] = {}
    if report is not None:
        experts |= with_provenance(plan, report.experts, progress)
        found = report.tensors
    tensors = {}
    for tensor, entry in old.tensors.items():
        ranks = {expert: rank for expert, rank in entry.ranks.items() if expert != name}
        ranks |= found.get(tensor, {}).get("ranks", {})
        tensors[tensor] = entry.model_copy(update={"ranks": dict(sorted(ranks.items()))})
    changed = ChangeRecord(at=now(), change=change, expert=name, versions=versions())
    vocabulary = old.vocabulary
    if vocabulary is not None:
        left = {expert: entry for expert, entry in vocabulary.added.items() if expert != name}
        vocabulary = vocabulary.model_copy(update={"added": left})
    return old.model_copy(
        update={
            "recipe": recipe,
            "root": record_root(plan.recipe, out),
            "experts": dict(sorted(experts.items())),
            "tensors": tensors,
            "vocabulary": vocabulary,
            "fallback": None if old.fallback is None else sorted({*old.fallback, *plan.fallback}),
            "notes": [*old.notes, *plan.notes, *(left_to_shared(report) if report else ())],
            "changes": [*old.changes, changed],
        }
    )
