"""Refuses, before any work, experts that could not answer rows and rows that could not be read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from twinmerge.errors import DataError, MismatchError, RecipeError
from twinmerge.files.rows import Row, read_rows, require_image
from twinmerge.hf.answers import Answers, answers_of
from twinmerge.hf.heads import load_head
from twinmerge.hf.images import PROCESSOR, load_processor, open_image, reads_images
from twinmerge.hf.inputs import TEXTS, limit_of, text_of
from twinmerge.hf.loading import load_tokenizer, quiet, without_weights
from twinmerge.hf.own import OWN, files_of, trained_length
from twinmerge.hf.positions import position_table
from twinmerge.merging.executor import one_thread
from twinmerge.models.source import Expert
from twinmerge.twin.plan import BATCH_STATISTICS, Plan
from twinmerge.twin.recipe import Recipe, RouterSettings
from twinmerge.twin.shared import require_fine_tunes

_ROWS_LOOKED_AT = 200
"""Of each expert's router data, whether the tokenizer knows their words."""
_MOSTLY_UNKNOWN = 0.5
_ENOUGH = 100
"""Inputs of an expert from which BatchNorm's statistics are estimated without being asked for."""
_WEIGHED_BYTES = 10**9
"""Of an expert in float32: what is measured of a larger one takes memory and disk of which nobody was told."""


@dataclass(frozen=True)
class Checked:
    """A plan that was found good, and what was read to find it so.

    Attributes:
        plan: with `max_length` of its recipe where the experts' tokenizers say one, weighting settled, and more notes.
        rows: the router data of every expert, in the gate's order.
        answers: how each expert answers.
        own: what is kept of each expert beside weights: file -> content.
    """

    plan: Plan
    rows: Mapping[str, list[Row]]
    answers: Mapping[str, Answers]
    own: Mapping[str, Mapping[str, bytes]]

    def write_own(self, folder: Path) -> None:
        """Keep what is each expert's own in a twin's folder."""
        for name, files in self.own.items():
            for file, content in files.items():
                path = folder / "experts" / name / OWN / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)


def checked(plan: Plan) -> Checked:
    """Look at everything that an input or an answer will need: tokenizers, heads, lengths, layers, rows.

    Raises:
        MismatchError: if an expert answers no rows of text, has something of its own that it cannot have alone, or is
            no fine-tune of the base.
        RecipeError: if the recipe asks for more positions than there are, or for what needs inputs that are missing.
        DataError: if router data are missing, too few, or unknown to the tokenizer.
        CheckpointError: if a head holds NaN or Inf.
    """
    base = plan.base.path
    model = without_weights(base)
    tokenizer = None if reads_images(model) else load_tokenizer(base)
    rows = router_rows(plan)
    reader = _reader(base, model, tokenizer) if any(rows.values()) else None
    answers, own, heads = {}, {}, {}
    for name, expert in plan.experts.items():
        answers[name] = answers_of(_config(expert, plan), f"expert {name!r}")
        other = plan.allow.vocabulary
        own[name] = files_of(name, _folder(expert), base, tokenizer, answers[name], other_vocabulary=other)
        if head := expert.read_head():
            heads[name] = load_head(expert.config, head)
    _require_one_way(heads)
    with_head = [name for name, expert in plan.experts.items() if expert.head]
    if without := [name for name in plan.experts if with_head and name not in with_head]:
        raise MismatchError(
            f"expert {with_head[0]!r} has a head of its own, expert {without[0]!r} has none; give all or none"
        )
    with one_thread():
        require_fine_tunes(plan)
    notes = [note for name, part in rows.items() if part and reader for note in reader(name, part)]
    longest, more = _length(plan, model, tokenizer) if tokenizer else (plan.recipe.max_length, [])
    router, told = _router(plan.recipe, images=reads_images(model))
    settled = {"weighting": _weighting(plan, rows), "bn": _statistics(plan, rows)}
    exclusive = plan.recipe.exclusive.model_copy(update=settled)
    recipe = plan.recipe.model_copy(update={"max_length": longest, "exclusive": exclusive, "router": router})
    return Checked(replace(plan, recipe=recipe, notes=(*plan.notes, *notes, *more, *told)), rows, answers, own)


def _reader(base: Path, model: Any, tokenizer: Any) -> Callable[[str, Sequence[Row]], list[str]]:
    """What looks at an expert's router data, as the base reads them, and gives notes.

    Raises:
        MismatchError: if the base reads neither texts nor images, or has not what they are read with.
    """
    if reads_images(model):
        if load_processor(base) is None:
            raise MismatchError(f"base {base} has no {PROCESSOR}, without which no image is read; put the file there")
        return partial(_require_images, channels=getattr(model.config, "num_channels", 3))
    if model.main_input_name != "input_ids" or _both(model.config):
        found = "texts and images at once" if _both(model.config) else model.main_input_name
        raise MismatchError(
            f"base {base} reads {found}; a twin's inputs are rows of text, or of images for a tower that reads images"
        )
    if tokenizer is None:
        raise MismatchError(f"base {base} has no tokenizer, and router data are rows of text; put its files there")
    return partial(_unknown_words, tokenizer=tokenizer)


def _both(config: Any) -> bool:
    """Whether a class compares texts with images, as CLIP: it answers neither alone."""
    towers = hasattr(config, "vision_config") and hasattr(config, "text_config")
    return towers and hasattr(config, "projection_dim")


def _require_images(name: str, rows: Sequence[Row], channels: int) -> list[str]:
    """Decode every picture once: a build that would fail at the last is no use.

    Raises:
        DataError: naming the first that cannot be read.
    """
    for number, row in enumerate(rows, start=1):
        if "image" not in row:
            raise DataError(f"experts.{name}.router_data: row {number} lacks 'image', and the base reads images")
        require_image(row["image"], f"experts.{name}.router_data: row {number}")
        try:
            open_image(row["image"], channels)
        except DataError as error:
            raise DataError(f"experts.{name}.router_data: row {number}: {error}") from error
    return []


def _router(recipe: Recipe, *, images: bool) -> tuple[RouterSettings | None, list[str]]:
    """Router settings as the inputs allow them, and a note on what they do not.

    Raises:
        RecipeError: if nothing of them is left.
    """
    if recipe.router is None or not images or not recipe.router.features.tokens:
        return recipe.router, []
    features = recipe.router.features
    if features.layers is None:
        raise RecipeError("router.features: images have no tokens, found tokens; use all, last or layer:K")
    left = replace(features, tokens=False, form="sum")
    note = f"router.features: images have no tokens, so that of {features} the hidden states of {left} are left"
    return recipe.router.model_copy(update={"features": left}), [note]


def _require_one_way(heads: Mapping[str, Any]) -> None:
    """Refuse classes of which one makes inputs for the backbone that another does not: they share the pass."""
    for asking, first in heads.items():
        other = next((name for name, head in heads.items() if type(head) is not type(first)), None)
        if first.asks and other is not None:
            raise MismatchError(
                f"expert {asking!r} is a {type(first).__name__}, which gives its backbone "
                f"{', '.join(sorted(first.asks))}, expert {other!r} is a {type(heads[other]).__name__}; experts of one "
                "twin share the backbone's pass"
            )


def _weighting(plan: Plan, rows: Mapping[str, Sequence[Row]]) -> Literal["none", "inputs", "two_sided"]:
    """What directions are weighed by, settled.

    Raises:
        MismatchError: if it is asked for and cannot be measured.
    """
    settings, stacks = plan.recipe.exclusive, plan.base.config.get("is_encoder_decoder")
    without = next((name for name in plan.experts if not rows[name]), None)
    if without is not None and settings.weighting in ("inputs", "two_sided"):
        raise RecipeError(
            f"exclusive.weighting: {settings.weighting} is measured on inputs of every expert, and "
            f"experts.{without}.router_data is missing; name a file of them, or use none"
        )
    if settings.weighting != "auto":
        if settings.weighting != "none" and stacks:
            raise MismatchError(
                f"exclusive.weighting: {settings.weighting} is measured on models of one stack, and base "
                f"{plan.base.path} is an encoder-decoder; use none"
            )
        return settings.weighting
    size = sum(spec.numel for spec in plan.base.specs.values() if spec.dtype.is_floating_point) * 4
    fits = without is None and settings.budget is not None and not stacks and size <= _WEIGHED_BYTES
    return "two_sided" if fits else "none"


def _statistics(plan: Plan, rows: Mapping[str, Sequence[Row]]) -> Literal["per_expert", "shared", "recalibrate"]:
    """Whose statistics BatchNorm takes, settled.

    Raises:
        RecipeError: if they are to be estimated and an expert has no inputs.
    """
    settings = plan.recipe.exclusive
    without = next((name for name in plan.experts if not rows[name]), None)
    if settings.bn == "recalibrate" and without is not None:
        raise RecipeError(
            f"exclusive.bn: recalibrate runs inputs of every expert, and experts.{without}.router_data is missing; "
            "name a file of them, or use per_expert"
        )
    if settings.bn != "auto":
        return settings.bn
    there = any(task.name.endswith(BATCH_STATISTICS) for task in plan.tasks)
    enough = all(len(rows[name]) >= _ENOUGH for name in plan.experts)
    return "recalibrate" if there and enough and settings.budget is not None else "per_expert"


def _config(expert: Expert, plan: Plan) -> Mapping[str, Any]:
    """The config of the class that answers."""
    return expert.config if expert.head or expert.config.get("architectures") else plan.base.config


def _folder(expert: Expert) -> Path:
    path = expert.checkpoint.path
    return path if path.is_dir() else path.parent


def _length(plan: Plan, model: Any, tokenizer: Any) -> tuple[int | None, list[str]]:
    """Tokens that inputs are cut at: the recipe's, else the most that any expert was trained on; and notes."""
    asked, table = plan.recipe.max_length, position_table(model)
    if asked is not None and table is not None and asked > table:
        raise RecipeError(f"max_length: the model has positions for {table} tokens, found {asked}")
    trained = {name: trained_length(_folder(e), plan.base.path) for name, e in plan.experts.items()}
    if asked is not None:
        longer = {name: length for name, length in trained.items() if length is not None and length > asked}
        return asked, [
            f"{n!r} was trained on up to {length} tokens, inputs are cut at {asked}" for n, length in longer.items()
        ]
    said = [length for length in trained.values() if length is not None]
    limit = limit_of(model, tokenizer, None)
    whole = len(said) < len(trained) or not said or (limit is not None and max(said) >= limit)
    return None if whole else max(said), []


def router_rows(plan: Plan) -> dict[str, list[Row]]:
    """The router data of every expert, in the gate's order; none of one that has no file, where there is no router."""
    files = plan.recipe.router_files
    rows: dict[str, list[Row]] = {name: [] for name in plan.expert_names}
    for name in files:
        rows[name] = read_rows(files[name], labelled=False)
        if len(rows[name]) < 2:
            key = f"experts.{name}.router_data"
            raise DataError(f"{key} holds {len(rows[name])} row; the router needs at least 2 of every expert")
    return rows


def _unknown_words(name: str, rows: Sequence[Row], tokenizer: Any) -> list[str]:
    """A note where the tokenizer knows few words of an expert's inputs.

    Raises:
        DataError: if it knows none.
    """
    for number, row in enumerate(rows, start=1):
        if not any(field in row for field in TEXTS):
            raise DataError(f"experts.{name}.router_data: row {number} lacks 'text', and the base reads texts")
    texts = [text_of(tokenizer, row) for row in rows[:: max(1, len(rows) // _ROWS_LOOKED_AT)]]
    with quiet():  # texts beyond the model's length, which are cut when they are read
        tokens = [token for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in ids]
    unknown = sum(token == tokenizer.unk_token_id for token in tokens)
    if unknown == len(tokens):
        what = f"every token is {tokenizer.unk_token}" if tokens else "not a single token"
        raise DataError(
            f"experts.{name}.router_data: to the base's tokenizer, its texts are {what}; are they in its language, "
            "and is it the base's tokenizer?"
        )
    share = unknown / len(tokens)
    return [f"experts.{name}.router_data: {share:.0%} of its tokens are unknown"] if share > _MOSTLY_UNKNOWN else []
