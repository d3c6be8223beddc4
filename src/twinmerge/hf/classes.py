"""Says what transformers' classes make of a folder's tensors: their names, which are the head's, which are joined."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.models.auto import modeling_auto as auto

from twinmerge.errors import CheckpointError, MismatchError
from twinmerge.files.checkpoint import Checkpoint, TensorSpec
from twinmerge.files.scratch import scratch
from twinmerge.files.writer import save_tensors
from twinmerge.hf.adapters import merge_adapter
from twinmerge.hf.loading import load_config, load_tokenizer, tokenizer_bytes, without_weights
from twinmerge.hf.vocabulary import vocabulary_tables
from twinmerge.models.source import Layout

_TASKS: Mapping[str, Mapping[str, Any]] = {
    "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "FEATURE_EXTRACTION": auto.MODEL_MAPPING_NAMES,
}
"""PEFT's task types whose class may be another than the base's."""


class Transformers:
    """The `Library` of transformers' classes; models are made on the meta device, no weight is needed."""

    def by_class(self, stored: Checkpoint, folder: Path, cls: str | None) -> tuple[Checkpoint, Layout, tuple[str, ...]]:
        """See `Library`; what the class splits or joins on loading is written to a temporary file as it has it."""
        model = without_weights(folder, cls, stored.specs)
        known, found = model.state_dict(), _Names.of(model, stored.specs)
        specs: dict[str, TensorSpec] = {}
        for name, new in found.plain.items():
            if new in specs:
                raise CheckpointError(
                    f"{stored.path}: two tensors are {new!r} of {type(model).__name__}, {name!r} is one"
                )
            specs[new] = replace(stored.specs[name], name=new)
        specs |= _joined(model, stored, found)
        missing = {name for name in known if name not in specs and known[name].is_floating_point()}
        keys: Any = SimpleNamespace(missing_keys=missing, unexpected_keys=set(found.unknown))
        model._adjust_missing_and_unexpected_keys(keys)  # what transformers itself neither needs nor minds
        left_out = sorted(n for n in keys.unexpected_keys if stored.specs[n].dtype.is_floating_point)
        layout = _layout(model)
        required = frozenset(name for name in known if name in specs or name in keys.missing_keys) - set(layout.tied)
        config = stored.config or Checkpoint.open(folder).config
        return replace(stored, specs=specs, config=config), replace(layout, required=required), tuple(left_out)

    def names(self, folder: Path, cls: str | None, stored: Iterable[str]) -> tuple[Layout, dict[str, str], bool]:
        """See `Library`."""
        model = without_weights(folder, cls, stored)
        layout, floats = _layout(model), {n for n, value in model.state_dict().items() if value.is_floating_point()}
        found = _Names.of(model, stored)
        return replace(layout, required=frozenset(floats) - set(layout.tied)), found.plain, bool(found.joined)

    def merged(self, folder: Path, base: Checkpoint, config: Mapping[str, Any]) -> Path:
        """See `Library`."""
        out = scratch(4 * sum(spec.numel for spec in base.specs.values()))
        merge_adapter(folder, base, config, out)
        return out

    def class_for(self, folder: Path, task: str) -> str | None:
        """See `Library`."""
        found = _TASKS.get(task, {}).get(load_config(folder).model_type)
        return found if found is None or isinstance(found, str) else str(found[0])

    def tokens(self, folder: Path, like: Path) -> dict[str, int] | None:
        """See `Library`."""
        if tokenizer_bytes(folder) == tokenizer_bytes(like):
            return None
        tokenizer = load_tokenizer(folder, like)
        return None if tokenizer is None else dict(tokenizer.get_vocab())


LIBRARY = Transformers()


def backbone_name(model: PreTrainedModel) -> str:
    """The attribute that holds a model's backbone, "" where it has no head.

    It is the class's `base_model_prefix`; some classes with a head have nothing of that name, but one model inside.
    """
    prefix = model.base_model_prefix
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        return prefix
    inner = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    return inner[0] if len(inner) == 1 and "For" in type(model).__name__ and not model.can_generate() else ""


def _layout(model: PreTrainedModel) -> Layout:
    name, cls = backbone_name(model), type(model).__name__
    outputs: Any = model.get_output_embeddings
    return Layout(
        cls=cls,
        backbone=type(model.get_submodule(name)).__name__ if name else cls,
        root=f"{name}." if name else "",
        shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        required=frozenset(),
        tied=dict(model.all_tied_weights_keys),
        speaks=outputs() is not None,
        vocabulary=vocabulary_tables(model),
        answers="For" in cls and not model.can_generate(),
    )


@dataclass(frozen=True)
class _Names:
    """What a class calls the tensors of a file."""

    plain: dict[str, str]
    """Name in the file -> of the class."""
    joined: dict[str, list[tuple[str, str]]]
    """The first of the class's names that a conversion makes -> what it is made of, and by which pattern."""
    unknown: list[str]
    converters: Mapping[str, WeightConverter]

    @classmethod
    def of(cls, model: PreTrainedModel, stored: Iterable[str]) -> "_Names":
        """As transformers does on loading."""
        changes = get_model_conversion_mapping(model)
        renamings = [change for change in changes if isinstance(change, WeightRenaming)]
        converters = [change for change in changes if isinstance(change, WeightConverter)]
        known, prefix = model.state_dict(), model.base_model_prefix
        found = cls({}, {}, [], {pattern: one for one in converters for pattern in one.source_patterns})
        for name in sorted(stored, key=dot_natural_key):
            new, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if new not in known:  # what the class's own folder holds may be named as it is
                new, pattern = rename_source_key(name, [], [], prefix, known)
            if new not in known:
                found.unknown.append(name)
            elif pattern is None:
                found.plain[name] = new
            else:
                found.joined.setdefault(new, []).append((name, pattern))
        return found


def _joined(model: PreTrainedModel, stored: Checkpoint, found: _Names) -> dict[str, TensorSpec]:
    """What a class splits or joins on loading, one group at a time, in files that are gone when the program ends.

    Raises:
        MismatchError: if it cannot be done, or would be done once more with the result.
        CheckpointError: if there is no room for the files.
    """
    if not found.joined:
        return {}
    specs: dict[str, TensorSpec] = {}
    folder = scratch(sum(stored.specs[name].nbytes for group in found.joined.values() for name, _ in group))
    for count, (first, group) in enumerate(found.joined.items()):
        converter = deepcopy(found.converters[group[0][1]])
        for name, pattern in group:
            converter.add_tensor(first, name, pattern, partial(stored.read, name))  # type: ignore[arg-type]  # or a call
        try:
            made = converter.convert(first, model=model, config=model.config)
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
            raise MismatchError(f"{stored.path}: {group[0][0]!r} and {first!r} do not fit: {error}") from error
        tensors = {n: (t[0] if isinstance(t, list) else t).contiguous() for n, t in made.items()}
        save_tensors(tensors, folder / f"{count}.safetensors")
        specs |= Checkpoint.open(folder / f"{count}.safetensors").specs
    if again := _Names.of(model, specs).joined:
        raise MismatchError(
            f"{stored.path}: {next(iter(again))!r} of {type(model).__name__} is made of other tensors on each "
            "loading, and a twin that holds it would not load"
        )
    return specs
