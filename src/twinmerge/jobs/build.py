"""Builds a twin: weights, then the router (which needs a model), then the manifest and the model card."""

import datetime
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from twinmerge.errors import MismatchError
from twinmerge.files.hashes import fingerprint_of, sha256_of_json
from twinmerge.files.progress import Progress, silent
from twinmerge.files.rows import Row
from twinmerge.files.target import durable_folder, require_free, require_space, size_of
from twinmerge.hf.classes import LIBRARY
from twinmerge.hf.features import check_router
from twinmerge.hf.images import load_processor
from twinmerge.hf.kinds import fallback_of, parameter_kinds
from twinmerge.hf.loading import load_backbone, load_tokenizer, skeleton
from twinmerge.hf.model import TwinModel
from twinmerge.hf.router_data import EncodedRows
from twinmerge.jobs.check import check_twin
from twinmerge.jobs.measure import for_twin, for_weighting
from twinmerge.jobs.preflight import Checked, checked
from twinmerge.jobs.recalibrate import recalibrate
from twinmerge.merging.executor import MEMORY_BYTES, Executor, make_executor
from twinmerge.models.compatible import Allow
from twinmerge.models.provenance import describe_input, portable
from twinmerge.models.source import Model
from twinmerge.routing.fit import fit_router
from twinmerge.routing.router import Router
from twinmerge.routing.store import save_router
from twinmerge.runtime.precision import PrecisionChoice, Running, require_known
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.twin.budget import Needs
from twinmerge.twin.decompose import WeightsReport, write_weights
from twinmerge.twin.manifest import (
    CheckRecord,
    ExpertRecord,
    HashedFile,
    Manifest,
    ParameterRecord,
    RouterRecord,
    record_recipe,
    record_root,
    write_manifest,
)
from twinmerge.twin.plan import Kind, Plan, make_plan
from twinmerge.twin.recipe import Recipe, RouterSettings
from twinmerge.twin.weighting import Weighting

_WORTH_A_NOTE = 1e-3


def build(
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    allow: Allow = Allow(),
    overwrite: bool = False,
    resume: bool = False,
    memory_bytes: int = MEMORY_BYTES,
    executor: Executor | None = None,
    check: bool = True,
    fast_only: bool = False,
    precision: PrecisionChoice | None = None,
    progress: Progress = silent,
) -> TwinArtifact:
    """Build a twin: merge the shared expert, compress the exclusive knowledge, fit the router.

    Everything is checked before work begins; the folder appears whole or not at all.

    Args:
        recipe: a recipe, or the path of its YAML file.
        out: the twin's folder.
        allow: differences between base and experts that are not refused.
        overwrite: replace a folder that exists; refused otherwise.
        resume: go on with what an interrupted run left; its finished parameters are verified first.
        memory_bytes: what a process may take while weights are merged and decomposed; each worker of `processes` and
            `ray` is one. The router needs the shared expert in memory on top.
        executor: where parameters are decomposed; None takes a thread for every core. The result has the same bits.
        check: try the finished twin on real rows before it is published (`jobs.check`); the manifest says if not.
        fast_only: refuse experts that change what no fast gated layer serves.
        precision: of matrix products in the passes that the router learns from; None is no less precise than the
            weights are stored.
        progress: called with (stage, done, total).

    Returns:
        The twin on disk.

    Raises:
        InputError: whatever is wrong with the recipe, the models or the data, in one line.
        CheckError: if the finished twin does not compute what it should.
    """
    require_known(precision)
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    out = Path(out)
    require_free(out, overwrite=overwrite, resume=resume)
    found = checked(open_plan(recipe, allow, fast_only=fast_only))
    plan, calibration, weighting = found.plan, for_twin(found), for_weighting(found, memory_bytes)
    needs = Needs.of(plan)
    executor = needs.within(executor or make_executor("threads"), memory_bytes)
    settings = sha256_of_json(recipe.model_dump(mode="json", exclude={"root"}))
    fingerprint = fingerprint_of(plan.files, recipe=settings, versions=versions())
    with durable_folder(out, fingerprint, overwrite=overwrite, resume=resume) as target:
        if not target.complete:
            target.clear()
            require_space(target.work, needs.disk_bytes - size_of(target.work))
            report = write_weights(
                plan,
                target.folder,
                target.work,
                progress,
                executor=executor,
                finished=dict(target.finished),
                record=target.record,
                measured=calibration.measure(target, progress) if calibration else {},
                weighting=Weighting(weighting.measure(target, progress)) if weighting else None,
            )
            found.write_own(target.folder)
            manifest = new_manifest(plan, report, out, left_out(found.rows, recipe.router), progress)
            written = TwinArtifact(target.folder, manifest)
            if plan.recipe.exclusive.bn == "recalibrate":
                recalibrate(written, found.rows, seed=recipe.seed, progress=progress)
            finish(written, found, check=check, precision=precision, progress=progress)
    return TwinArtifact.open(out)


def new_manifest(
    plan: Plan, report: WeightsReport, out: Path, notes: Sequence[str] = (), progress: Progress = silent
) -> Manifest:
    """What the manifest of a twin that will lie in `out` says before its router is fitted."""
    recipe = record_recipe(plan.recipe)
    return Manifest(
        created=now(),
        recipe=recipe,
        root=record_root(plan.recipe, out),
        versions=versions(),
        base=describe_input(plan.base, recipe.base),
        experts=with_provenance(plan, report.experts, progress),
        tensors={name: ParameterRecord(**entry) for name, entry in report.tensors.items()},
        vocabulary=plan.vocabulary,
        fallback=list(plan.fallback),
        notes=[*plan.notes, *notes, *left_to_shared(report)],
    )


def finish(
    written: TwinArtifact,
    found: Checked,
    known: Mapping[str, HashedFile] = {},
    *,
    check: bool,
    precision: PrecisionChoice | None = None,
    progress: Progress = silent,
) -> None:
    """Fit the router on a twin without one; write it, the model card, and the manifest once the twin was checked.

    Args:
        written: the twin, whole but for the router.
        found: what was checked before any work.
        known: entries of files that were hashed already.
        check: try the twin as it lies on disk.
        precision: of the passes that the router learns from.
        progress: told of the stages.
    """
    folder = written.path
    manifest = written.manifest.model_copy(update={"check": None})
    if (settings := found.plan.recipe.router) is not None:
        router = fit_on(written, found.plan.recipe, settings, found.rows, progress, precision)
        save_router(router, folder / "router")
        manifest = manifest.model_copy(update={"router": RouterRecord(**router.report)})
    (folder / "README.md").write_text(model_card(manifest), encoding="utf-8")
    if check:
        write_manifest(folder, manifest, known)
        kept = {name: entry.energy_kept for name, entry in manifest.experts.items()}
        report = CheckRecord.model_validate(check_twin(folder, found.plan, found.rows, kept, progress))
        manifest = manifest.model_copy(update={"check": report})
    write_manifest(folder, manifest, known)


def now() -> str:
    """The time, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Of what computes a twin."""
    return {name: importlib.metadata.version(name) for name in ("twinmerge", "torch", "transformers", "safetensors")}


def with_provenance(
    plan: Plan, entries: Mapping[str, Mapping[str, Any]], progress: Progress = silent
) -> dict[str, ExpertRecord]:
    """The manifest's entries of a plan's experts, with the hashes and licences of what they were read from."""
    described = {}
    for done, (name, entry) in enumerate(entries.items(), start=1):
        source = portable(plan.recipe.root, plan.recipe.experts[name].model)
        described[name] = ExpertRecord(**entry, **dict(describe_input(plan.experts[name].checkpoint, source)))
        progress("hashing experts", done, len(entries))
    return described


def open_plan(recipe: Recipe, allow: Allow = Allow(), *, fast_only: bool = False) -> Plan:
    """Find, open and match a recipe's files; what each layer is, and which way it goes, comes from the base's class.

    Raises:
        MismatchError: if some parameter needs the fall-back and `fast_only` refuses that.
    """
    base = recipe.locate(recipe.base, "base")
    if recipe.router is not None:
        check_router(base, recipe.router)
    shared: list[Any] = []

    def kinds(model: Model) -> Mapping[str, Kind]:
        shared.append(_skeleton(model))
        return parameter_kinds(shared[0])

    plan = make_plan(recipe, LIBRARY, kinds, allow=allow)
    return with_fallback(plan, shared[0], fast_only=fast_only)


def kinds_of(model: Model) -> Mapping[str, Kind]:
    """Parameter name -> what it is, of the model that a shared expert is made of."""
    return parameter_kinds(_skeleton(model))


def _skeleton(model: Model) -> Any:
    return skeleton(model.checkpoint.path, model.layout.cls, model.checkpoint.specs)


def with_fallback(plan: Plan, model: Any, *, fast_only: bool = False) -> Plan:
    """The plan with the parameters of a base's `skeleton` that go by the fall-back, and a note on what they cost."""
    fallback = fallback_of(model, plan.changed)
    if not fallback:
        return plan
    what = (
        f"{len(fallback)} of {len(plan.changed)} parameters that experts change have no fast gated layer, "
        f"first {fallback[0]!r}"
    )
    if fast_only:
        raise MismatchError(f"{what}; without --fast-only they go by the exact fall-back, a pass per distinct gate")
    note = f"{what}: they go by the exact fall-back, a pass per distinct gate in a batch"
    return replace(plan, fallback=fallback, notes=(*plan.notes, note))


def left_to_shared(report: WeightsReport) -> list[str]:
    """A note for every expert that learned what the recipe leaves to the shared expert."""
    changed = {name: entry for name, entry in report.experts.items() if entry["energy"]}
    shares = {name: entry["energy_left_out"] / entry["energy"] for name, entry in changed.items()}
    return [
        f"{name!r}: {share:.1%} of what it changed is left to the shared expert (exclusive.embeddings, exclusive.bn)"
        for name, share in shares.items()
        if share >= _WORTH_A_NOTE
    ]


def fit_on(
    twin: TwinArtifact,
    recipe: Recipe,
    settings: RouterSettings,
    rows: Mapping[str, Sequence[Row]],
    progress: Progress,
    precision: PrecisionChoice | None = None,
) -> Router:
    """Fit the router on a twin as it lies on disk; one that looks at the shared expert alone loads nothing else."""
    running, gated = Running.of(twin.dtype, precision), settings.features.form == "speculative"
    backbone = load_backbone(twin.path, dtype=running.dtype)
    parts = {name: twin.exclusive(name) if gated else {} for name in twin.expert_names}
    model = TwinModel(
        backbone,
        {name: {key: part.to(backbone.dtype) for key, part in own.items()} for name, own in parts.items()},
        tokenizer=load_tokenizer(twin.path),
        processor=load_processor(twin.path, backbone),
        max_length=recipe.max_length,
    )
    owners = [name for name, part in rows.items() for _ in part]
    every = EncodedRows.of(model, [row for part in rows.values() for row in part], progress, running.context)
    router = fit_router(every, owners, settings, seed=recipe.seed)
    if settings.features.layers is not None:
        router.report["precision"] = running.products
    progress("router fitted", 1, 1)
    return router


def left_out(rows: Mapping[str, Sequence[Row]], settings: RouterSettings | None) -> list[str]:
    """A note for every expert of whose router data only a part is used."""
    if settings is None:
        return []
    most = settings.samples_per_expert
    return [
        f"experts.{name}.router_data: {most:,} of its {len(part):,} rows are used, drawn at random "
        "(router.samples_per_expert)"
        for name, part in rows.items()
        if len(part) > most
    ]


def model_card(manifest: Manifest) -> str:
    """The twin's README.md, from its manifest."""
    experts = "\n".join(
        f"| {name} | {entry.source} | {entry.rank_mean:.1f} | {entry.energy_kept:.1%} |"
        for name, entry in manifest.experts.items()
    )
    licences = "; ".join(f"{name}: {entry.licence or 'none named'}" for name, entry in manifest.inputs.items())
    recipe = manifest.recipe
    changes = ", ".join(f"{change.change} {change.expert}" for change in manifest.changes)
    changed = f" It was merged before these changes: {changes}." if changes else ""
    return f"""---
library_name: twinmerge
tags: [merge, twin-merging]
---
# A twin of {len(manifest.experts)} experts

Built with [twinmerge](https://pypi.org/project/twinmerge/) {manifest.versions["twinmerge"]} by Twin-Merging
(arXiv:2406.15479) from base `{recipe.base}`. The folder loads as the shared expert with plain transformers;
`experts/NAME` loads on it as a PEFT adapter; `twinmerge.TwinModel.from_pretrained` mixes the experts for every input.

| expert | source | mean rank | energy kept |
|---|---|---|---|
{experts}

Shared expert: {_told(recipe.shared)}.{changed} Exclusive knowledge: {_told(dict(recipe.exclusive))}.
{_router_told(manifest)}

Licences of base and experts apply, as their model cards name them: {licences}.
"""


def _router_told(manifest: Manifest) -> str:
    """How inputs find their experts."""
    settings, router = manifest.recipe.router, manifest.router
    if settings is None or router is None:
        return "No router: every call says gate or expert."
    pairs = "; ".join(" and ".join(pair.experts) for pair in router.confused)
    return (
        f"Router: {settings.method} on features `{settings.features}`, {router.accuracy:.1%} right on\n"
        f"held-out router data, calibration error {router.calibration_error:.3f}."
        f"{f' Hard to tell apart: {pairs}.' if pairs else ''}"
    )


def _told(settings: Mapping[str, Any]) -> str:
    """Settings in words; those that are not set are left out."""
    return ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
