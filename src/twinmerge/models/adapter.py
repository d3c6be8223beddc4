"""Reads LoRA adapters in PEFT's layout: their pairs, what they train whole, and their head."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import MismatchError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.strict_json import read_json
from twinmerge.models.source import Expert
from twinmerge.tensors.difference import require_finite
from twinmerge.tensors.low_rank import LowRank

_PEFT_PREFIX = "base_model.model."
_REFUSED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "kasa_config", "velora_config", "alora_invocation_tokens",
    "trainable_token_indices", "target_parameters", "layer_replication",
)  # fmt: skip
_CLASS_ENDINGS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
"""PEFT's task types -> how transformers' classes with a head end."""


@dataclass(frozen=True)
class AdapterExpert(Expert):
    """A LoRA adapter: the task vector is `(alpha/r) B A`, never a merge of A and B separately (METHOD §2)."""

    pairs: Mapping[str, tuple[str, str, float, bool]]
    """Base parameter name -> stored A, stored B, scale, and whether the parameter is stored transposed, (in, out)."""

    @property
    def is_adapter(self) -> bool:
        """Whether task vectors come as factors."""
        return True

    def trains(self, name: str) -> bool:
        """Whether it has a pair for a base parameter, or saves it whole."""
        return name in self.stored or name in self.pairs

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


def open_adapter(
    name: str, folder: Path, base: Checkpoint, transposed: Collection[str], resolve: Callable[[str], str | None]
) -> AdapterExpert:
    """Open a LoRA adapter, from headers only.

    Args:
        name: the expert's name.
        folder: of the adapter.
        base: the base model.
        transposed: base parameters that a pair multiplies transposed (embeddings, Conv1D).
        resolve: an adapter's name of a parameter -> the base's, None for one that the base lacks.

    Raises:
        MismatchError: if it is no plain LoRA or trains what the base lacks.
        CheckpointError: if the files cannot be read.
    """
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
