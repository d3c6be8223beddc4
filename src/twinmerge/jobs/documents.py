"""Merges what a recipe's file asks for: one model, or several, later ones made of earlier ones (mergekit-multi)."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any, TypedDict, Unpack

from twinmerge.errors import RecipeError
from twinmerge.files.target import require_free
from twinmerge.files.writer import copy_side_files
from twinmerge.jobs.merge import fingerprint, merge_models
from twinmerge.merging.executor import Executor
from twinmerge.merging.plan import plan_merge
from twinmerge.merging.recipe import document_names, load_merge, parse_kit
from twinmerge.models.compatible import Allow
from twinmerge.models.source import open_model


class Options(TypedDict, total=False):
    """As for `merge_models`."""

    allow: Allow
    overwrite: bool
    resume: bool
    memory_bytes: int
    executor: Executor | None
    hash_inputs: bool
    progress: Any


def merge_file(path: Path, out: Path, seed: int = 0, **options: Unpack[Options]) -> dict[str, Any]:
    """Merge what a file asks for.

    Of several documents all but one have a name, by which others may call their results as models. What they are
    merged into lies in `OUT.steps`, which is removed once the last one, the one without a name or that nobody calls, is
    in `out`.

    Args:
        path: a YAML file.
        out: the model's folder.
        seed: of random draws in mergekit's recipes.
        **options: see `merge_models`; `resume` also keeps the steps that are finished.

    Returns:
        The manifest of what is in `out`.

    Raises:
        InputError: whatever is wrong with a document, or with how they call each other.
    """
    names = document_names(path)
    if len(names) < 2:
        return merge_models(load_merge(path, seed, join=joined), out, **options)
    order = _order(path, names)
    resume = options.get("resume", False)
    require_free(out, overwrite=options.get("overwrite", False), resume=resume)
    steps, merged = out.with_name(f"{out.name}.steps"), dict[str, Path]()
    for document in order[:-1]:
        name = names[document]
        assert name is not None
        merge = load_merge(path, seed, join=joined, document=document, merged=merged)
        folder, note = steps / str(document), steps / f"{document}.json"
        known = json.dumps(fingerprint(plan_merge(merge, options.get("allow", Allow()))), sort_keys=True)
        if not (resume and note.is_file() and note.read_text(encoding="utf-8") == known):
            note.unlink(missing_ok=True)
            steps.mkdir(parents=True, exist_ok=True)
            of_step: Options = {**options, "overwrite": folder.exists()}
            merge_models(merge, folder, **of_step)
            note.write_text(known, encoding="utf-8")
        merged[name] = folder
    last = load_merge(path, seed, join=joined, document=order[-1], merged=merged)
    manifest = merge_models(last, out, **options)
    shutil.rmtree(steps)
    return manifest


def _order(path: Path, names: list[str | None]) -> list[int]:
    """The documents so that each comes after those that it is made of, the one that nobody is made of last.

    Raises:
        RecipeError: if two have one name, two have none, or they go round in a circle.
    """
    given = [name for name in names if name is not None]
    if twice := next((name for name in given if given.count(name) > 1), None):
        raise RecipeError(f"{path}: {names.count(twice)} documents are named {twice!r}; give each a name of its own")
    if len(given) < len(names) - 1:
        raise RecipeError(
            f"{path} holds {len(names)} documents, of which all but the last result need a name, found "
            f"{len(given)} with one"
        )
    recipes = [parse_kit(path, document) for document in range(len(names))]
    needs = [{given.index(one) for one in _models(recipe) if one in given} for recipe in recipes]
    needs = [{names.index(given[place]) for place in found} for found in needs]
    order: list[int] = []
    while len(order) < len(names):
        ready = [i for i in range(len(names)) if i not in order and needs[i] <= {*order}]
        if not ready:
            raise RecipeError(f"{path}: its documents are made of each other in a circle")
        order.append(min(ready, key=lambda i: (names[i] is None, i)))
    called = set().union(*needs)
    if loose := [i for i in order[:-1] if i not in called]:
        raise RecipeError(f"{path}: nothing is made of the document {names[loose[0]]!r}; take it out, or use it")
    return order


def _models(recipe: Any) -> set[str]:
    """What a document calls its models."""
    listed = [*recipe.models, *(source for part in recipe.slices for source in part.sources)]
    return {*(source.model for source in listed), recipe.base_model, recipe.whose_tokenizer} - {None}


@cache
def joined(model: Path, adapter: Path) -> Path:
    """A model with an adapter of any kind merged into it by PEFT, in a folder that is gone when the program ends.

    Both are in memory meanwhile, those of 16 bits in float32, in which the result is kept too.
    """
    from twinmerge.hf.classes import LIBRARY  # the model library, which recipes without adapters do without

    base = open_model(model, LIBRARY).checkpoint
    folder = LIBRARY.merged(adapter, base, base.config)
    config = (folder / "config.json").read_bytes()
    copy_side_files(model, folder)
    (folder / "config.json").write_bytes(config)
    return folder
