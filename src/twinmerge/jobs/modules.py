"""Builds a twin of any torch module from state dicts; `runtime.wrapped.wrap` puts it around the module again."""

import inspect
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from twinmerge.errors import CheckpointError, DataError, MismatchError, RecipeError
from twinmerge.files.checkpoint import WEIGHTS, Checkpoint
from twinmerge.files.hashes import fingerprint_of, sha256_of_json
from twinmerge.files.progress import Progress, silent
from twinmerge.files.scratch import scratch
from twinmerge.files.target import durable_folder, require_free, require_space
from twinmerge.files.writer import save_tensors
from twinmerge.hf.kinds import parameter_kinds
from twinmerge.jobs.build import model_card, new_manifest, versions
from twinmerge.jobs.check import distance, require_law
from twinmerge.merging.executor import MEMORY_BYTES, Executor, make_executor, one_thread
from twinmerge.merging.method import Calibrated
from twinmerge.models.compatible import Allow, compare_dtypes
from twinmerge.models.source import Expert
from twinmerge.routing.fit import fit_router
from twinmerge.routing.router import Stored
from twinmerge.routing.store import save_router
from twinmerge.runtime.survey import survey
from twinmerge.runtime.wrapped import LAST, Called, Wrapped, wrap
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.twin.budget import Needs
from twinmerge.twin.decompose import write_weights
from twinmerge.twin.manifest import CheckRecord, Manifest, RouterRecord, write_manifest
from twinmerge.twin.plan import Plan, assemble
from twinmerge.twin.recipe import Recipe, RouterSettings
from twinmerge.twin.shared import require_fine_tunes

StateDict = Mapping[str, Tensor]
Source = StateDict | Path | str
"""A state dict; a folder with safetensors (as timm saves it); a file of safetensors; or a file that torch saved."""
Rows = Tensor | Mapping[str, Tensor]
"""Inputs of a module, (row, ...): its first argument, or some by name."""
_NESTED = ("state_dict", "model", "model_state_dict")
"""Where training frameworks keep the state dict in their checkpoints."""
_NAME = "input"
_FEATURE_ROWS = 64


def build_from_state_dicts(
    module: nn.Module,
    experts: Mapping[str, Source],
    out: Path | str,
    *,
    inputs: Rows,
    base: Source | None = None,
    heads: Sequence[str] = (),
    router_inputs: Mapping[str, Rows] | None = None,
    features: str | None = None,
    shared: Mapping[str, Any] | None = None,
    exclusive: Mapping[str, Any] | None = None,
    router: Mapping[str, Any] | Literal["none"] | None = None,
    seed: int = 0,
    allow: Allow = Allow(),
    overwrite: bool = False,
    memory_bytes: int = MEMORY_BYTES,
    executor: Executor | None = None,
    progress: Progress = silent,
) -> TwinArtifact:
    """Build a twin of fine-tunes of any torch module; the folder appears whole or not at all.

    Args:
        module: of the experts' class; not changed.
        experts: by name, two or more.
        out: the twin's folder.
        inputs: a few rows as the module takes them, at least two; their shapes are kept, their values are not.
        base: what the experts were fine-tuned from; None is the module as it is.
        heads: what the names of tensors begin with that are each expert's own, of any shape, such as ("classifier",).
        router_inputs: inputs that belong to each expert; None makes a twin without a router.
        features: the submodule whose output the router looks at, averaged over positions; "" is the module's output.
            Needed with router_inputs.
        shared: as in a recipe.
        exclusive: as in a recipe.
        router: as in a recipe; its features are always those of `features`.
        seed: of everything random.
        allow: `unrelated` fine-tunes are not refused.
        overwrite: replace a folder that exists.
        memory_bytes: what a process may take while weights are merged and decomposed.
        executor: where parameters are decomposed; None takes a thread for every core.
        progress: called with (stage, done, total).

    Returns:
        The twin on disk; `wrap(module, out)` loads it.

    Raises:
        InputError: whatever is wrong with settings, state dicts or inputs, in one line.
        CheckError: if the finished twin does not compute what it should.
    """
    out = Path(out)
    require_free(out, overwrite=overwrite, resume=False)
    settings = _settings(experts, shared, exclusive, router if router_inputs is not None else "none", seed)
    named = _named(module, inputs)
    if router_inputs is not None:
        _require_router_inputs(experts, router_inputs, features)
        _require_submodule(module, features)
    called = Called.of(named, features if router_inputs is not None else None, heads)
    plan = _plan(module, base, experts, called, settings, allow)
    needs = Needs.of(plan)
    executor = needs.within(executor or make_executor("threads"), memory_bytes)
    with one_thread():
        require_fine_tunes(plan)
    fingerprint = fingerprint_of([], recipe=sha256_of_json(settings.model_dump(mode="json")), versions=versions())
    with durable_folder(out, fingerprint, overwrite=overwrite) as target:
        target.clear()
        require_space(target.work, needs.disk_bytes)
        report = write_weights(plan, target.folder, target.work, progress, executor=executor)
        called.write(target.folder)
        manifest = new_manifest(plan, report, out, (), progress)
        write_manifest(target.folder, manifest)
        model = wrap(module, target.folder)
        if settings.router is not None and router_inputs is not None:
            rows = {name: _named(module, router_inputs[name]) for name in sorted(router_inputs)}
            fitted = _fitted(model, rows, settings.router, seed, progress)
            save_router(fitted, target.folder / "router")
            manifest = manifest.model_copy(update={"router": RouterRecord(**fitted.report)})
        manifest = manifest.model_copy(update={"check": _checked(module, model, named)})
        (target.folder / "README.md").write_text(_card(manifest), encoding="utf-8")
        write_manifest(target.folder, manifest)
    return TwinArtifact.open(out)


def _settings(
    experts: Mapping[str, Source],
    shared: Mapping[str, Any] | None,
    exclusive: Mapping[str, Any] | None,
    router: Mapping[str, Any] | Literal["none"] | None,
    seed: int,
) -> Recipe:
    """What a recipe says, checked as a recipe is."""
    given = {"shared": shared, "exclusive": exclusive}
    sections: dict[str, Any] = {name: dict(value) for name, value in given.items() if value is not None}
    if router == "none":
        sections["router"] = "none"
    else:
        sections["router"] = {"gate": "hard", **dict(router or {}), "features": "last"}
    sources = {name: {"model": name, "router_data": None if router == "none" else name} for name in experts}
    try:
        recipe = Recipe.model_validate({"base": "base", "experts": sources, "seed": seed, **sections})
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise RecipeError(f"{where + ': ' if where else ''}{fault['msg'].removeprefix('Value error, ')}") from error
    if isinstance(recipe.shared, Calibrated):
        raise RecipeError(f"shared.method: {recipe.shared.method} measures transformers models, not plain modules")
    if recipe.exclusive.weighting in ("inputs", "two_sided"):
        raise RecipeError(
            f"exclusive.weighting: {recipe.exclusive.weighting} is measured on transformers models; use none"
        )
    if recipe.exclusive.bn == "recalibrate":
        raise RecipeError("exclusive.bn: recalibrate runs transformers models; use per_expert or shared")
    return recipe


def _named(module: nn.Module, rows: Rows) -> dict[str, Tensor]:
    """Inputs by the names of a module's arguments.

    Raises:
        DataError: if they are no rows.
    """
    first = next(iter(inspect.signature(module.forward).parameters), _NAME)
    named = {first: rows} if isinstance(rows, Tensor) else dict(rows)
    counts = {len(value) if value.ndim else 0 for value in named.values()}
    if len(counts) != 1 or max(counts) < 2:
        raise DataError(f"inputs must be tensors of as many rows, two at least, found {sorted(counts)}")
    return named


def _require_router_inputs(
    experts: Mapping[str, Source], router_inputs: Mapping[str, Rows], features: str | None
) -> None:
    if set(router_inputs) != set(experts):
        odd = sorted(set(experts) ^ set(router_inputs))
        raise DataError(
            f"router_inputs must hold rows of every expert and of no other, found a difference in {odd[0]!r}"
        )
    if features is None:
        raise RecipeError("features must name the submodule that the router looks at, such as the last before the head")


def _require_submodule(module: nn.Module, features: str | None) -> None:
    known = dict(module.named_modules())
    if features not in known:
        raise RecipeError(
            f"features: the module has no submodule {features!r}; known are {', '.join([*known][1:9])}, ..."
        )


def _plan(
    module: nn.Module,
    base: Source | None,
    experts: Mapping[str, Source],
    called: Called,
    settings: Recipe,
    allow: Allow,
) -> Plan:
    """Everything found, matched by the module's own names, and laid out."""
    stored = module.state_dict()
    found = _opened("base", stored if base is None else base)
    floats = {n: tuple(v.shape) for n, v in stored.items() if v.is_floating_point() and not called.is_head(n)}
    _require_tensors("the base", found, floats, called)
    kept = {name: spec for name, spec in found.specs.items() if name in stored and not called.is_head(name)}
    ours = replace(found, specs=kept, config={})
    opened = {}
    for name in sorted(experts):
        checkpoint = _opened(name, experts[name])
        _require_tensors(f"expert {name!r}", checkpoint, floats, called)
        head = tuple(sorted(tensor for tensor in checkpoint.specs if called.is_head(tensor)))
        if odd := [tensor for tensor in head if tensor not in stored]:
            raise MismatchError(f"expert {name!r}: {odd[0]!r} of its head is no tensor of the module")
        opened[name] = Expert(name, replace(checkpoint, config={}), {n: n for n in floats}, head)
    notes = [note for name, e in opened.items() for note in compare_dtypes(ours, name, e.checkpoint, e.stored)]
    kinds = parameter_kinds(module)
    plan = assemble(settings, ours, opened, kinds, allow, notes)
    ways = survey(module.eval(), plan.changed, called.example).ways
    fallback = tuple(sorted(name for name, way in ways.items() if way == "fallback"))
    return replace(plan, fallback=fallback)


def _require_tensors(whose: str, checkpoint: Checkpoint, floats: Mapping[str, tuple[int, ...]], called: Called) -> None:
    """Refuse a state dict with a tensor too few, too many, or of another shape."""
    specs = checkpoint.specs
    if lacking := [name for name in floats if name not in specs]:
        raise MismatchError(
            f"{whose} lacks {len(lacking)} of {len(floats)} tensors of the module, first {lacking[0]!r}"
        )
    for name, spec in specs.items():
        if called.is_head(name) or not spec.dtype.is_floating_point:
            continue
        if name not in floats:
            raise MismatchError(f"{whose} has a tensor {name!r}, which the module lacks; of a head say so in heads")
        if spec.shape != floats[name]:
            raise MismatchError(
                f"{whose}: {name!r} has shape {list(spec.shape)}, the module {list(floats[name])}; if it is each "
                "expert's own, name it in heads"
            )


def _opened(name: str, source: Source) -> Checkpoint:
    """A state dict as a checkpoint; one in memory, or saved by torch, is written to a folder for a while.

    Raises:
        CheckpointError: if it is none.
    """
    if not isinstance(source, Mapping):
        path = Path(source).expanduser()
        if path.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
            return Checkpoint.open(path)
        source = _loaded(path)
    held: Mapping[str, Any] = source
    nested = next((held[key] for key in _NESTED if isinstance(held.get(key), Mapping)), held)
    tensors = {str(key).removeprefix("module."): value for key, value in nested.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{name} holds no tensors; expected a state dict")
    folder = scratch(sum(value.nbytes for value in tensors.values()))
    save_tensors({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, folder / WEIGHTS)
    return Checkpoint.open(folder)


def _loaded(path: Path) -> Mapping[str, Any]:
    """What torch saved, tensors alone: no code of the file is run."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read as tensors alone: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}; expected a state dict")
    return loaded


def _fitted(
    model: Wrapped, rows: Mapping[str, Mapping[str, Tensor]], settings: RouterSettings, seed: int, progress: Progress
) -> Any:
    """A router on what its layer gives for inputs of known experts."""
    found, owners = [], []
    for done, (name, inputs) in enumerate(rows.items(), start=1):
        count = len(next(iter(inputs.values())))
        for start in range(0, count, _FEATURE_ROWS):
            found.append(model.features(**{k: v[start : start + _FEATURE_ROWS] for k, v in inputs.items()}))
        owners += [name] * count
        progress("router features", done, len(rows))
    return fit_router(Stored({LAST: torch.cat(found).cpu()}), owners, settings, seed=seed)


def _checked(module: nn.Module, model: Wrapped, rows: Mapping[str, Tensor]) -> CheckRecord:
    """Hold the twin against merged weights on the given rows, under mixed gates; heads are the experts' own.

    Raises:
        CheckError: naming the law.
    """
    count = min(len(next(iter(rows.values()))), 2 * len(model.expert_names))
    few = {name: value[:count] for name, value in rows.items()}
    generator = torch.Generator().manual_seed(0)
    gate = torch.rand(count, len(model.expert_names), generator=generator).add(0.1).log().softmax(dim=1)
    out = model(gate=gate, **few)
    merged, alone = 0.0, 0.0
    for row in range(count):
        one = {name: value[row : row + 1] for name, value in few.items()}
        ours = out.outputs[row] if isinstance(out.outputs, Tensor | list) else None
        if not isinstance(ours, Tensor):
            raise MismatchError(f"the module must give one tensor (batch, ...), found {type(out.outputs).__name__}")
        with torch.inference_mode():
            state = model.state_for(gate[row], out.expert[row])
            whole = torch.func.functional_call(module.eval(), state, kwargs=one)
        itself = model(gate=gate[row : row + 1], expert=out.expert[row], **one).outputs[0]
        merged = max(merged, distance(ours.flatten().float(), whole.flatten().float()))
        alone = max(alone, distance(ours.flatten().float(), itself.flatten().float()))
    require_law("a gated forward must equal the module with merged weights", merged)
    require_law("a row alone must give what it gives in a batch", alone)
    return CheckRecord(rows=count, forward=float(f"{merged:.1e}"), alone=float(f"{alone:.1e}"))


def _card(manifest: Manifest) -> str:
    """The twin's README.md."""
    return model_card(manifest).replace(
        "The folder loads as the shared expert with plain transformers;\n"
        "`experts/NAME` loads on it as a PEFT adapter; `twinmerge.TwinModel.from_pretrained` mixes the experts for "
        "every input.",
        "It is of a plain torch module: `twinmerge.wrap(module, folder)` mixes the experts for every input.",
    )
