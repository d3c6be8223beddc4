"""Reads LoRA adapters in PEFT's layout: their pairs, what they train whole, and their head."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import MismatchError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.strict_json import read_json
from twinmerge.models.compatible import require_values
from twinmerge.models.match import fit, match, place, require_backbone
from twinmerge.models.source import Expert, Layout, Library, Model, open_model
from twinmerge.tensors.difference import require_finite, task_vector
from twinmerge.tensors.low_rank import LowRank

_PREFIX = "base_model.model."
_PAIR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.(?!bias$)[^.]+)?(?:\.weight)?")
"""A pair's tensor; some tools leave the adapter's name in it, as in `lora_A.default.weight`."""
_WRAPPED = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)\.")
"""What PEFT puts into the name of a tensor that it trains whole, or stores as it was."""
_PLAIN_SETTINGS = (
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
)  # fmt: skip
"""Settings under which an adapter is its pairs and what it holds whole."""
_PLAIN_STARTS = ("True", "False", "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base as it is."""
_ALPHA = 8
"""PEFT's lora_alpha where a config has none."""


@dataclass(frozen=True)
class Pair:
    """A pair's tensors and what they add to a parameter: `scale * B A`, or its transpose."""

    a: str
    b: str
    scale: float
    transposed: bool


@dataclass(frozen=True)
class AdapterExpert(Expert):
    """A LoRA adapter: the task vector is `(alpha/r) B A`, never a merge of A and B separately (METHOD §2)."""

    pairs: Mapping[str, Pair] = field(default_factory=dict)
    """By the shared expert's parameter."""
    head_pairs: Mapping[str, Pair] = field(default_factory=dict)
    """By the head's tensor."""
    base: Checkpoint | None = None
    """Holds what the adapter leaves of its class's head as it is."""

    @property
    def is_adapter(self) -> bool:
        """Whether task vectors come as factors."""
        return True

    def trains(self, name: str) -> bool:
        """Whether it has a pair for a base parameter, or saves it whole."""
        return name in self.stored or name in self.pairs

    def task_vector(self, name: str, base: Tensor, bound: float | None = None) -> Tensor:
        """Expert minus base, as `Expert.task_vector`: what was trained whole and the pair's product, or zeros."""
        zeros = torch.zeros(base.shape, dtype=torch.promote_types(base.dtype, torch.float32))
        vector = zeros if name not in self.stored else super().task_vector(name, base, bound)
        return vector if name not in self.pairs else vector + self._product(self.pairs[name], base.shape)

    def change_flat(self, name: str, base: Tensor, start: int, shape: Sequence[int], bound: float | None) -> Tensor:
        """Entries of the task vector, flattened, without the matrix that a pair makes.

        Args:
            name: of the base parameter.
            base: its entries from `start` on, flattened.
            start: the first of them.
            shape: of the parameter.
            bound: as for `task_vector`.
        """
        zeros = torch.zeros(base.shape, dtype=torch.promote_types(base.dtype, torch.float32))
        stop = start + len(base)
        vector = zeros if name not in self.stored else task_vector(base, self.read_flat(name, start, stop, bound))
        if name not in self.pairs or not len(base):
            return vector
        columns, pair = math.prod(shape[1:]), self._factors(self.pairs[name])
        first, last = start // columns, -(-stop // columns)
        rows = (pair.up[first:last] @ pair.down).flatten()
        return vector + rows[start - first * columns : stop - first * columns]

    def factors(self, name: str) -> LowRank | None:
        """The pair as `up` (out, rank), `down` (rank, in) of the stored orientation, scale folded into `up`."""
        return self._factors(self.pairs[name]) if name in self.pairs and name not in self.stored else None

    def read_head(self) -> dict[str, Tensor]:
        """The head's tensors, finite, in their stored dtype; pairs are added."""
        return {
            name: tensor
            if name not in self.head_pairs
            else (tensor.double() + self._product(self.head_pairs[name], tensor.shape)).to(tensor.dtype)
            for name, tensor in super().read_head().items()
        }

    def head_source(self, name: str) -> Checkpoint:
        """The adapter, or the base for what it leaves as it is."""
        return self.checkpoint if name in self.checkpoint.specs or self.base is None else self.base

    def _product(self, pair: Pair, shape: Sequence[int]) -> Tensor:
        return self._factors(pair).dense().reshape(shape)

    def _factors(self, pair: Pair) -> LowRank:
        a, b = self.checkpoint.read(pair.a), self.checkpoint.read(pair.b)
        for stored, tensor in ((pair.a, a), (pair.b, b)):
            require_finite(tensor, self._where(stored))
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        a, b = a.to(wide).flatten(1), b.to(wide).flatten(1) * pair.scale
        return LowRank(a.T.contiguous(), b.T.contiguous()) if pair.transposed else LowRank(b, a)


def adapted_class(folder: Path, base: Model, library: Library) -> str:
    """The class that an adapter was trained on: by its config, one beside it or its task; else the base's."""
    settings = read_json(folder / "adapter_config.json")
    beside = read_json(folder / "config.json").get("architectures") if (folder / "config.json").exists() else None
    named = (settings.get("auto_mapping") or {}).get("base_model_class") or (beside[0] if beside else None)
    by_task = library.class_for(base.checkpoint.path, settings.get("task_type") or "")
    return str(by_task if by_task and named in (None, base.layout.cls) else named or base.layout.cls)


def open_adapter(
    name: str,
    folder: Path,
    base: Model,
    shared: Model,
    conv1d: Collection[str],
    library: Library,
    *,
    cls: str | None = None,
    head: Checkpoint | None = None,
) -> Expert:
    """Open an adapter: a plain LoRA from headers only, others merged by PEFT; see `expert.open_expert`.

    Args:
        name: the expert's name.
        folder: of the adapter.
        base: the base model, of its own class.
        shared: see `expert.shared_model`.
        conv1d: parameters that are stored transposed, as Conv1D's.
        library: knows classes.
        cls: the class that it was trained on; None is the one that its files name.
        head: tensors of its head that it lacks.

    Raises:
        MismatchError: if it holds what is not understood, trains what the base lacks or is no change of weights.
        MissingExtraError: if it is no plain LoRA, and PEFT is not there.
        CheckpointError: if the files cannot be read.
    """
    settings = read_json(folder / "adapter_config.json")
    checkpoint = Checkpoint.open(folder / "adapter_model.safetensors")
    require_values(checkpoint)
    modules, others = _parse(name, checkpoint)
    cls = cls or adapted_class(folder, base, library)
    wanted = [*others, *(f"{module}.weight" for module in modules)]
    layout, names, joined = library.names(base.checkpoint.path, cls, wanted)
    require_backbone(name, layout, shared, base.checkpoint.config.get("model_type"))
    if head is not None and (joined or not _is_plain(settings)):
        raise MismatchError(
            f"experts.{name}.head is for plain LoRA adapters, and {folder} is merged by PEFT; merge it into a model "
            "with its head and give that folder"
        )
    if joined or not _is_plain(settings):
        held = {names[p]: checkpoint.specs[stored].shape for p, stored in others.items() if p in names}
        own_head = {own: shape for own, shape in held.items() if place(layout, shared, own)[0]}
        full = library.merged(folder, base.checkpoint, _head_config(folder, layout, own_head, base))
        expert = match(name, open_model(full, library), shared)
        note = f"{name!r} is no plain LoRA adapter ({settings.get('peft_type')}) and was merged by PEFT, in memory"
        return replace(expert, checkpoint=replace(expert.checkpoint, path=checkpoint.path), notes=(note, *expert.notes))
    if unknown := [stored for plain, stored in others.items() if plain not in names]:
        raise MismatchError(
            f"adapter {name!r} holds {unknown[0]!r}, which is neither of a pair nor a tensor of a {cls}; put "
            "the config.json of the model it was trained on beside it, or merge it into that model and give the folder"
        )
    checkpoint = _without_tied(
        name, checkpoint.renamed({stored: names[plain] for plain, stored in others.items()}), layout, base
    )
    whole = {own: checkpoint.specs[own] for plain in others if (own := names[plain]) in checkpoint.specs}
    stored, of_head, extra = fit(f"adapter {name!r}", layout, shared, whole)
    if extra:
        raise MismatchError(
            f"adapter {name!r} trains {extra[0]!r}, which the base lacks; was it trained on the same base?"
        )
    notes: list[str] = []
    found: tuple[dict[str, Pair], dict[str, Pair]] = {}, {}
    for module, pair in modules.items():
        own = names.get(f"{module}.weight", "")
        in_head, target = place(layout, shared, layout.tied.get(own, own))
        if target is None or not {"A", "B"} <= pair.keys() or own not in layout.shapes:
            raise MismatchError(
                f"adapter {name!r} trains {module!r}, which the base lacks; was it trained on the same base?"
            )
        if target in found[in_head]:
            raise MismatchError(f"adapter {name!r} trains {module!r} and what is tied to it; merge it into its base")
        if own in {*layout.tied, *layout.tied.values()}:
            notes.append(f"{name!r} trains {module!r}, which is tied to another: both change, as in PEFT's merge")
        transposed = "embedding" in pair or (not in_head and target in conv1d)
        shape = layout.shapes[target] if in_head else shared.checkpoint.specs[target].shape
        rank = _rank_of(name, checkpoint, pair, target, shape, transposed)
        alpha = _pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha", _ALPHA))
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        found[in_head][target] = Pair(pair["A"], pair["B"], float(scale), transposed)
    config: dict[str, Any] = {}
    if needed := [own for own in sorted(layout.required) if place(layout, shared, own) == (True, own)]:
        beside = head or base.checkpoint
        shapes = {own: head.specs[own].shape for own in needed if own in head.specs} if head is not None else {}
        config = _head_config(folder, layout, {**shapes, **{own: whole[own].shape for own in of_head}}, base)
        known = beside.specs if head is not None or cls == base.layout.cls else ()
        if lacking := [own for own in needed if own not in of_head and own not in known]:
            raise MismatchError(
                f"adapter {name!r} was trained on a {cls}, whose {lacking[0]!r} neither it nor the base holds; "
                f"name a file that has it as experts.{name}.head, or merge it into the model it was trained on"
            )
        of_head = tuple(needed)
    checkpoint = replace(checkpoint, config=config)
    return AdapterExpert(name, checkpoint, stored, of_head, tuple(notes), *found, head or base.checkpoint)


def _parse(name: str, checkpoint: Checkpoint) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Module -> its pair's tensors; and every other tensor by its name in the model.

    Raises:
        MismatchError: if there is none, or one is there twice.
    """
    modules: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    for stored in checkpoint.specs:
        plain = stored.removeprefix(_PREFIX)
        if ".original_module." in plain:
            continue  # the base's own value
        pair = _PAIR.fullmatch(plain)
        entries, key = (modules.setdefault(pair[1], {}), pair[3]) if pair else (others, _WRAPPED.sub(".", plain))
        if key in entries:
            raise MismatchError(f"adapter {name!r} holds both {entries[key]!r} and {stored!r}; give one adapter")
        entries[key] = stored
        if pair and pair[2]:
            entries["embedding"] = stored
    if not modules and not others:
        raise MismatchError(
            f"adapter {name!r} holds no tensors of its own in {checkpoint.path.name}; was it saved whole?"
        )
    return modules, others


def _without_tied(name: str, checkpoint: Checkpoint, layout: Layout, base: Model) -> Checkpoint:
    """Without what is stored although another tensor stands for it.

    Raises:
        MismatchError: if the two differ.
    """
    specs = dict(checkpoint.specs)
    for own, source in layout.tied.items():
        if own in specs:
            other = checkpoint if source in specs else base.checkpoint
            if not torch.equal(checkpoint.read(own), other.read(source)):
                raise MismatchError(
                    f"adapter {name!r} trains {own!r} apart from {source!r}, to which the base ties it; save the base "
                    "with tie_word_embeddings false, or merge the adapter into such a base and give the folder"
                )
            del specs[own]
    return replace(checkpoint, specs=specs)


def _head_config(folder: Path, layout: Layout, head: Mapping[str, Sequence[int]], base: Model) -> dict[str, Any]:
    """The config of the class whose head an adapter brings: the one beside it, else the base's.

    Labels that the adapter trained anew have no names in the base's config.
    """
    beside = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if beside.get("model_type") == base.checkpoint.config.get("model_type"):
        return {**beside, "architectures": [layout.cls]}
    config = {**base.checkpoint.config, "architectures": [layout.cls]}
    if not head:
        return config
    known = len(config.get("id2label") or range(2))
    labels = next((shape[0] for own, shape in head.items() if tuple(shape) != layout.shapes[own]), known)
    for key in ("label2id", "num_labels", "problem_type", "finetuning_task"):
        config.pop(key, None)
    return {**config, "id2label": {str(i): f"LABEL_{i}" for i in range(labels)}}


def _is_plain(settings: Mapping[str, Any]) -> bool:
    """Whether an adapter is its pairs and what it holds whole, under settings that this module knows."""
    unknown = [key for key, value in settings.items() if value and key not in _PLAIN_SETTINGS]
    starts = str(settings.get("init_lora_weights", True)) in _PLAIN_STARTS  # else the base was changed too
    return settings.get("peft_type") == "LORA" and starts and not unknown


def _pattern(patterns: Mapping[str, int | float] | None, module: str, default: int | float) -> int | float:
    """PEFT's rule: a pattern matches the end of a module's name."""
    return next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", module)), default)


def _rank_of(
    name: str,
    checkpoint: Checkpoint,
    pair: Mapping[str, str],
    parameter: str,
    shape: Sequence[int],
    transposed: bool,
) -> int:
    """The rank of a pair that fits a parameter.

    Raises:
        MismatchError: if it does not, or has no direction at all.
    """
    a, b = checkpoint.specs[pair["A"]].shape, checkpoint.specs[pair["B"]].shape
    rows, columns = shape[0], math.prod(shape[1:])
    wide, tall = (rows, columns) if transposed else (columns, rows)
    fits = len(a) > 1 and len(b) > 1 and (math.prod(a[1:]), b[0], math.prod(b[1:])) == (wide, tall, a[0])
    if not fits or not a[0]:
        raise MismatchError(
            f"adapter {name!r}: the pair {list(b)} x {list(a)} does not fit {parameter!r} {list(shape)}; "
            "was it trained on the same base?"
        )
    return a[0]
