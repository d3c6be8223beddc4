"""Knows how one expert's files, a full fine-tune or a LoRA adapter, answer to the base's parameter names."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import MismatchError
from twinmerge.files.checkpoint import Checkpoint, read_json
from twinmerge.models.compatible import require_plausible
from twinmerge.tensors.difference import require_finite, task_vector
from twinmerge.tensors.low_rank import LowRank

_PEFT_PREFIX = "base_model.model."
_REFUSED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "kasa_config", "velora_config", "alora_invocation_tokens",
    "trainable_token_indices", "target_parameters", "layer_replication",
)  # fmt: skip
_CLASS_ENDINGS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
"""PEFT's task types -> how transformers' classes with a head end."""


@dataclass(frozen=True)
class Expert:
    """A full fine-tune: which stored tensor is which base parameter, and which are its head."""

    name: str
    checkpoint: Checkpoint
    stored: Mapping[str, str]
    """Base parameter name -> name in the expert's files."""
    head: Mapping[str, str]
    """Its task head, which the base does not have: name in the expert's class -> name in the expert's files."""

    @property
    def is_adapter(self) -> bool:
        """Whether task vectors come as factors."""
        return False

    def task_vector(self, name: str, base: Tensor, bound: float | None = None) -> Tensor:
        """Expert minus base, float32, shaped as `base`.

        Raises:
            CheckpointError: if the expert holds NaN, Inf or a magnitude beyond `bound`.
        """
        tensor = self.checkpoint.read(self.stored[name])
        require_plausible(tensor, self._where(self.stored[name]), bound=bound)
        return task_vector(base, tensor)

    def read_flat(self, name: str, start: int, stop: int, bound: float | None) -> Tensor:
        """Entries `start` to `stop` of the expert's own value, flattened, in its stored dtype.

        Raises:
            CheckpointError: if they hold NaN, Inf or a magnitude beyond `bound`.
        """
        tensor = self.checkpoint.read_flat(self.stored[name], start, stop)
        require_plausible(tensor, self._where(self.stored[name]), start, bound)
        return tensor

    def factors(self, name: str) -> LowRank | None:
        """Factors of the task vector of a 2-D parameter, None if there is none in factored form."""
        return None

    def read_head(self) -> dict[str, Tensor]:
        """The head's tensors, finite, in their stored dtype."""
        tensors = {}
        for name, stored in self.head.items():
            tensors[name] = self.checkpoint.read(stored)
            require_finite(tensors[name], self._where(stored))
        return tensors

    def _where(self, stored: str) -> str:
        return f"expert {self.name!r}: {stored!r} in {self.checkpoint.specs[stored].file}"

    @property
    def config(self) -> dict[str, Any]:
        """The expert's config.json."""
        return self.checkpoint.config


@dataclass(frozen=True)
class AdapterExpert(Expert):
    """A LoRA adapter: the task vector is `(alpha/r) B A`, never a merge of A and B separately (METHOD §2)."""

    pairs: Mapping[str, tuple[str, str, float, bool]]
    """Base parameter name -> stored A, stored B, scale, and whether the parameter is stored transposed, (in, out)."""

    @property
    def is_adapter(self) -> bool:
        """Whether task vectors come as factors."""
        return True

    def task_vector(self, name: str, base: Tensor, bound: float | None = None) -> Tensor:
        """Expert minus base, float32, shaped as `base`: the product of the pair, or zeros where none was trained."""
        factors = self.factors(name)
        if factors is not None:
            return factors.dense().reshape(base.shape)
        if name in self.stored:
            return super().task_vector(name, base, bound)
        return torch.zeros(base.shape, dtype=torch.float32)

    def factors(self, name: str) -> LowRank | None:
        """The pair as `up` (out, rank), `down` (rank, in) of the stored orientation, scale folded into `up`."""
        if name not in self.pairs:
            return None
        name_a, name_b, scale, transposed = self.pairs[name]
        a, b = self.checkpoint.read(name_a), self.checkpoint.read(name_b)
        for stored, tensor in ((name_a, a), (name_b, b)):
            require_finite(tensor, self._where(stored))
        a, b = a.float().flatten(1), b.float().flatten(1) * scale
        return LowRank(a.T.contiguous(), b.T.contiguous()) if transposed else LowRank(b, a)


def open_expert(
    name: str,
    folder: Path,
    base: Checkpoint,
    transposed: Collection[str],
    by_class: Callable[[Checkpoint], Checkpoint],
) -> Expert:
    """Open an expert and match its tensors with the base's, from headers only.

    Args:
        name: the expert's name.
        folder: a transformers folder, or a PEFT LoRA adapter.
        base: the base model.
        transposed: base parameters that a LoRA pair multiplies transposed (embeddings, Conv1D).
        by_class: gives a full model under the names of its class's parameters.

    Raises:
        MismatchError: if a parameter is missing, extra or of another shape, or the architecture differs.
        CheckpointError: if the files cannot be read.
    """
    if (folder / "adapter_config.json").exists():
        return _open_adapter(name, folder, base, transposed)
    checkpoint = by_class(Checkpoint.open(folder))
    _require_same_architecture(name, checkpoint.config, base.config)
    match = _match(base, checkpoint)
    missing = [
        name
        for name in base.specs
        if name.startswith(match.root_base) and name not in match.stored and _is_float(base, name)
        if "pooler" not in name.split(".")  # which some classes with a head do without
    ]
    if missing:
        raise MismatchError(
            f"expert {name!r} lacks {len(missing)} of {len(base.specs)} parameters, first {missing[0]!r}; "
            "was it fine-tuned from the same base?"
        )
    taken = set(match.stored.values())
    others = sorted(stored for stored in checkpoint.specs if stored not in taken)
    extra = [stored for stored in others if stored.startswith(match.root_expert) and _is_float(checkpoint, stored)]
    if extra:
        raise MismatchError(
            f"expert {name!r} has {len(extra)} tensors that the base lacks, first {extra[0]!r}; "
            "was it fine-tuned from the same base?"
        )
    head = [stored for stored in others if _is_float(checkpoint, stored)]
    stored = {}
    for parameter, found in match.stored.items():
        if checkpoint.specs[found].shape == base.specs[parameter].shape:
            stored[parameter] = found
        elif found.startswith(match.backbone_root):
            raise MismatchError(
                f"expert {name!r}: {found!r} has shape {list(checkpoint.specs[found].shape)}, "
                f"the base's {parameter!r} {list(base.specs[parameter].shape)}; resize it to the base's shape"
            )
        else:
            head.append(found)
    return Expert(name, checkpoint, stored, {stored: stored for stored in sorted(head)})


def _is_float(checkpoint: Checkpoint, name: str) -> bool:
    """Integer tensors are buffers, which newer files leave out."""
    return checkpoint.specs[name].dtype.is_floating_point


def _require_same_architecture(name: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if found.get("model_type") != expected.get("model_type") and found and expected:
        raise MismatchError(
            f"expert {name!r} is a {found.get('model_type')!r} model, the base is {expected.get('model_type')!r}; "
            "experts must be fine-tuned from the base"
        )


@dataclass(frozen=True)
class _Match:
    """How an expert's names answer to the base's."""

    stored: dict[str, str]
    """Base name -> expert name."""
    root_base: str
    """Base names that open so must all be matched."""
    root_expert: str
    """Expert names that open so must all be matched; what lies outside is the head."""
    backbone_root: str
    """Expert names that open so are backbone, whose shapes must be the base's."""


def _match(base: Checkpoint, expert: Checkpoint) -> _Match:
    """Match names that differ by the prefix of a head model ('bert.encoder...' and 'encoder...')."""
    prefixes = sorted({name.split(".")[0] + "." for name in [*base.specs, *expert.specs] if "." in name})
    candidates = [({n: n for n in base.specs if n in expert.specs}, "", "")]
    for prefix in prefixes:
        candidates.append(({n: prefix + n for n in base.specs if prefix + n in expert.specs}, "", prefix))
        shorter = {n: n.removeprefix(prefix) for n in base.specs if n.startswith(prefix)}
        candidates.append(({n: s for n, s in shorter.items() if s in expert.specs}, prefix, ""))
    stored, root_base, root_expert = max(candidates, key=lambda candidate: len(candidate[0]))
    if root_base or root_expert:
        return _Match(stored, root_base, root_expert, root_expert)
    roots = [name.split(".")[0] + "." for name in stored if "." in name]
    common = max(sorted(set(roots)), key=roots.count) if roots else ""
    same_class = base.config.get("architectures") == expert.config.get("architectures")
    return _Match(stored, "" if same_class else common, "" if same_class else common, common)


def _open_adapter(name: str, folder: Path, base: Checkpoint, transposed: Collection[str]) -> AdapterExpert:
    settings = _adapter_config(name, folder)
    checkpoint = Checkpoint.open(folder / "adapter_model.safetensors")
    modules: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    for stored in checkpoint.specs:
        plain = stored.removeprefix(_PEFT_PREFIX)
        match = re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", plain)
        if match:
            modules.setdefault(match[1], {})[match[2]] = stored
        else:
            others[plain.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = stored
    resolve = _resolver(base)
    pairs = {}
    for module, pair in modules.items():
        parameter = resolve(f"{module}.weight")
        if parameter is None or set(pair) != {"A", "B"}:
            raise MismatchError(
                f"adapter {name!r} trains {module!r}, which the base lacks; was it trained on the same base?"
            )
        rank = checkpoint.specs[pair["A"]].shape[0]
        alpha = _pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha", rank))
        scale = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
        pairs[parameter] = (pair["A"], pair["B"], float(scale), parameter in transposed)
        _require_fitting_pair(name, checkpoint, base, parameter, pair, parameter in transposed)
    stored_whole = {p: stored for plain, stored in others.items() if (p := resolve(plain)) is not None}
    head = {plain: stored for plain, stored in sorted(others.items()) if resolve(plain) is None}
    config = _head_config(name, folder, settings, checkpoint, head, base.config) if head else {}
    return AdapterExpert(name, Checkpoint(checkpoint.path, checkpoint.specs, config), stored_whole, head, pairs)


def _head_config(
    name: str,
    folder: Path,
    settings: Mapping[str, Any],
    checkpoint: Checkpoint,
    head: Mapping[str, str],
    base: Mapping[str, Any],
) -> dict[str, Any]:
    """The config of the class whose head an adapter brings: the folder's own, else the base's with class and labels."""
    if (folder / "config.json").exists():
        return read_json(folder / "config.json")
    stem = re.sub(r"(Model|For[A-Z]\w*)$", "", next(iter(base.get("architectures") or []), ""))
    ending = _CLASS_ENDINGS.get(settings.get("task_type") or "")
    found = (settings.get("auto_mapping") or {}).get("base_model_class") or (stem and ending and stem + ending)
    if not found:
        raise MismatchError(
            f"adapter {name!r} brings a head ({next(iter(head))!r}), but neither config.json nor task_type says "
            "of which class; put the fine-tuned model's config.json beside it"
        )
    labels = min(checkpoint.specs[stored].shape[0] for stored in head.values())
    return {**base, "architectures": [found], "id2label": {str(i): f"LABEL_{i}" for i in range(labels)}}


def _adapter_config(name: str, folder: Path) -> dict[str, Any]:
    settings = read_json(folder / "adapter_config.json")
    refused = [key for key in _REFUSED if settings.get(key)]
    if str(settings.get("init_lora_weights", True)) not in ("True", "False", "gaussian", "orthogonal"):
        refused.append(f"init_lora_weights={settings['init_lora_weights']}")  # the base was changed too
    if settings.get("peft_type") != "LORA" or refused:
        found = refused[0] if refused else settings.get("peft_type")
        raise MismatchError(
            f"adapter {name!r} uses {found}, which is no plain low-rank difference; "
            "merge it into its base and give the folder"
        )
    return settings


def _pattern(patterns: Mapping[str, int | float] | None, module: str, default: int | float) -> int | float:
    """PEFT's rule: a pattern matches the end of a module's name."""
    return next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", module)), default)


def _resolver(base: Checkpoint) -> Callable[[str], str | None]:
    """An adapter's name of a parameter -> the base's, whichever of the two has the prefix of a head model."""
    roots = sorted({n.split(".")[0] for n in base.specs})

    def resolve(name: str) -> str | None:
        if name in base.specs:
            return name
        shorter = name.split(".", 1)[-1]
        if shorter in base.specs:
            return shorter
        return next((f"{root}.{name}" for root in roots if f"{root}.{name}" in base.specs), None)

    return resolve


def _require_fitting_pair(
    name: str, checkpoint: Checkpoint, base: Checkpoint, parameter: str, pair: Mapping[str, str], transposed: bool
) -> None:
    shape_a, shape_b = checkpoint.specs[pair["A"]].shape, checkpoint.specs[pair["B"]].shape
    rows, columns = base.specs[parameter].shape[0], math.prod(base.specs[parameter].shape[1:])
    wide, tall = (rows, columns) if transposed else (columns, rows)
    if math.prod(shape_a[1:]) != wide or shape_b[0] != tall or math.prod(shape_b[1:]) != shape_a[0]:
        raise MismatchError(
            f"adapter {name!r}: the pair {list(shape_b)} x {list(shape_a)} does not fit {parameter!r} "
            f"{list(base.specs[parameter].shape)}; was it trained on the same base?"
        )
