"""Drafts a recipe: looks at folders of models, says what they are and what is missing."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from twinmerge.errors import InputError, RecipeError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.strict_json import read_json
from twinmerge.files.tables import FORMATS
from twinmerge.jobs.build import open_plan
from twinmerge.jobs.preflight import checked
from twinmerge.models.source import locate
from twinmerge.twin.recipe import EXPERT_NAME, Recipe

_ROWS = (".jsonl", *FORMATS)
_PLACES = ("{name}{suffix}", "{name}.router{suffix}", "data/{name}{suffix}", "data/{name}.router{suffix}")
"""Where the inputs of an expert often lie, seen from its folder's."""


@dataclass(frozen=True)
class _Found:
    """What a folder is."""

    words: str
    """As the recipe names it."""
    path: Path
    config: Mapping[str, Any]
    adapter: Mapping[str, Any] | None
    nbytes: int

    @property
    def cls(self) -> str:
        return str((self.config.get("architectures") or ["no class named"])[0])

    @property
    def has_head(self) -> bool:
        return "For" in self.cls and not self.cls.endswith(("ForCausalLM", "ForConditionalGeneration"))

    def described(self) -> str:
        """In a comment's words."""
        if self.adapter is not None:
            kind, rank = self.adapter.get("peft_type", "?"), self.adapter.get("r")
            return f"PEFT adapter, {kind}{f' of rank {rank}' if rank else ''}, {self.nbytes:,} bytes"
        labels = [str(label) for label in (self.config.get("id2label") or {}).values()] if self.has_head else []
        named = f", labels {', '.join(labels[:6])}{', ...' if len(labels) > 6 else ''}" if labels else ""
        return f"{self.cls}{named}, {self.nbytes:,} bytes"


def draft_recipe(models: Sequence[str], *, base: str | None = None, root: Path | str = ".") -> str:
    """A recipe of models, with comments on what was found and what is missing.

    Args:
        models: folders or hub ids of experts; one of them may be the base.
        base: folder or hub id of the base; None looks for it: what adapters name, a folder without a head among
            models of which others have one, or one called base.
        root: where the recipe will lie: paths are seen from there.

    Returns:
        YAML; its first lines say whether `twinmerge plan` finds it good, or its first refusal.

    Raises:
        RecipeError: if a model is not there, or holds no weights.
    """
    root = Path(root).resolve()
    found = [_look(words, root) for words in models]
    at, named = _base_of(found, base, root)
    experts = [one for one in found if at is None or one.path != at.path]
    lines = [*_base_lines(at, named)]
    lines += ["", "experts:"]
    for name, one in zip(_names(experts), experts, strict=True):
        lines += [f"  # {one.described()}", *_expert_lines(name, one, root)]
    if len(experts) < 2:
        lines += ["  # missing: a twin needs two experts or more"]
    lines += [
        "",
        "# what each expert keeps beside the shared one, as a share of the base's bytes",
        "exclusive: {budget: 0.06}",
    ]
    text = "\n".join(lines) + "\n"
    return "\n".join([*_verdict(text, root), ""]) + text


def _look(words: str, root: Path) -> _Found:
    """What a folder or hub id is.

    Raises:
        RecipeError: if it is not there, or holds no weights.
    """
    path = locate(Path.cwd(), words, "model")
    adapter = read_json(path / "adapter_config.json") if (path / "adapter_config.json").is_file() else None
    file = path / "adapter_model.safetensors" if adapter is not None else path
    try:
        nbytes = Checkpoint.open(file).nbytes
    except InputError as error:
        raise RecipeError(f"{words}: {error}") from error
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    local = Path(words).expanduser().exists()
    return _Found(_seen(path, root) if local else words, path, config, adapter, nbytes)


def _seen(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def _base_of(found: Sequence[_Found], base: str | None, root: Path) -> tuple[_Found | None, str | None]:
    """The base, if it is at hand, and what names it."""
    if base is not None:
        return _look(base, root), None
    named = next((str(one.adapter["base_model_name_or_path"]) for one in found
                  if one.adapter is not None and one.adapter.get("base_model_name_or_path")), None)  # fmt: skip
    if named is not None:
        for start in (Path.cwd(), next(one.path for one in found if one.adapter is not None)):
            if (start / named).is_dir():
                return _look(str((start / named).resolve()), root), None
        return None, named
    full = [one for one in found if one.adapter is None]
    bare = [one for one in full if not one.has_head]
    if len(bare) == 1 and len(full) > 1:
        return bare[0], None
    return next((one for one in full if one.path.name == "base"), None), None


def _base_lines(at: _Found | None, named: str | None) -> list[str]:
    if at is not None:
        return [f"# {at.described()}", f"base: {_quoted(at.words)}"]
    if named is not None:
        return ["# named by an adapter; a folder or a hub id", f"base: {_quoted(named)}"]
    return ["# missing: the model that the experts were fine-tuned from, a folder or a hub id", "base: ???"]


def _expert_lines(name: str, one: _Found, root: Path) -> Iterator[str]:
    yield f"  {name}:"
    yield f"    model: {_quoted(one.words)}"
    rows = _rows_of(name, one.path)
    if rows is None:
        yield "    # missing: a file of inputs that belong to it, unlabelled (or say router: none below)"
        yield "    # router_data: data.jsonl"
    else:
        yield f"    router_data: {_quoted(_seen(rows, root))}"
    task = (one.adapter or {}).get("task_type")
    if one.adapter is not None and task in ("SEQ_CLS", "TOKEN_CLS") and "id2label" not in one.config:
        yield "    # an adapter keeps no names of its labels: LABEL_0, LABEL_1, ... without a list here"
        yield "    # labels: [first, second]"


def _rows_of(name: str, folder: Path) -> Path | None:
    places = [place.format(name=name, suffix=suffix) for suffix in _ROWS for place in _PLACES]
    around = [folder.parent / place for place in places] + [folder.parent.parent / place for place in places]
    return next((path for path in around if path.is_file()), None)


def _names(experts: Sequence[_Found]) -> list[str]:
    """A name for each: its folder's, with the folder's above where two are the same."""
    last = [re.sub(r"[^A-Za-z0-9_.-]", "-", Path(one.words).name or one.path.name).strip(".-_") for one in experts]
    last = [name if re.fullmatch(EXPERT_NAME, name) else f"expert-{index + 1}" for index, name in enumerate(last)]
    lower = [name.lower() for name in last]
    return [
        name if lower.count(name.lower()) == 1 and name != "shared" else f"{name}-{index + 1}"
        for index, name in enumerate(last)
    ]


def _verdict(text: str, root: Path) -> list[str]:
    """Whether a plan could be made of a recipe."""
    try:
        recipe = Recipe.model_validate({**yaml.safe_load(text), "root": root})
        plan = checked(open_plan(recipe)).plan
    except InputError as error:
        return ["# A draft by `twinmerge init`. `twinmerge plan` says:", f"#   {str(error).splitlines()[0]}"]
    except ValueError as error:
        reason = str(error).split("Value error, ")[-1].splitlines()[0].split(" [type=")[0]
        return ["# A draft by `twinmerge init`. What is missing:", f"#   {reason}"]
    notes = [f"#   note: {note}" for note in plan.notes]
    return ["# A draft by `twinmerge init`; `twinmerge plan` finds it good.", *notes]


def _quoted(words: str) -> str:
    """A path as YAML takes it."""
    return words if re.fullmatch(r"[\w./-]*[A-Za-z_][\w./-]*", words) else yaml.safe_dump(words).splitlines()[0]
