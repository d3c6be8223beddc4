"""Merges adapters that are no plain LoRA into full models, by PEFT's own code."""

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from twinmerge.errors import MismatchError, MissingExtraError
from twinmerge.files.checkpoint import WEIGHTS, Checkpoint
from twinmerge.files.writer import save_tensors
from twinmerge.hf.loading import LOCAL, quiet

_FAULTS = (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError, ImportError, IndexError)
"""What PEFT raises for adapters that do not fit, or that it cannot merge."""


def merge_adapter(folder: Path, base: Checkpoint, config: Mapping[str, Any], out: Path) -> None:
    """Write the full model that PEFT makes of an adapter; both are in memory meanwhile, 16-bit ones in float32.

    Args:
        folder: the adapter's.
        base: the model it was trained on, of any head.
        config: of the model's class, with its labels.
        out: an existing folder.

    Raises:
        MissingExtraError: if PEFT is not installed.
        MismatchError: if the adapter does not fit, or is no change of weights.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError(f"{folder} is merged by PEFT: pip install 'twinmerge[peft]'") from error
    stored = Checkpoint.open(folder / "adapter_model.safetensors")
    cls: Any = getattr(transformers, config["architectures"][0])
    narrow = all(spec.dtype.itemsize < 4 for spec in base.specs.values() if spec.dtype.is_floating_point)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about tied weights and about transformers
        model, info = cls.from_pretrained(
            base.path, config=AutoConfig.for_model(**config), dtype=torch.float32 if narrow else "auto",
            output_loading_info=True, ignore_mismatched_sizes=True, **LOCAL,
        )  # fmt: skip
        new = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
        if random := sorted(name for name in new if f"base_model.model.{name}" not in stored.specs):
            raise MismatchError(
                f"{folder} was trained on a {cls.__name__}, whose {random[0]!r} neither it nor the base holds; "
                "merge it into the model it was trained on and give the folder"
            )
        try:
            settings: Any = peft.PeftConfig.from_pretrained(str(folder))
            settings.inference_mode = True
            adapted: Any = peft.get_peft_model(model, settings)
            result = adapted.load_adapter(str(folder), "default")
            shared = _sharing(adapted, result.missing_keys)
            merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
        except _FAULTS as error:
            kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
            raise MismatchError(
                f"{folder} is a {kind} adapter that PEFT cannot merge into this base ({_reason(error)}); "
                "only changes of weights make an expert"
            ) from error
    if odd := [*(name for name in result.missing_keys if name not in shared), *result.unexpected_keys]:
        raise MismatchError(
            f"{folder}: {odd[0]!r} is not both in the file and in what adapter_config.json makes of a {cls.__name__}; "
            "was it trained on the same base?"
        )
    state, tied = merged.state_dict(), merged.all_tied_weights_keys
    if apart := [name for name, source in tied.items() if not torch.equal(state[name], state[source])]:
        raise MismatchError(f"{folder} trains {apart[0]!r} apart from {tied[apart[0]]!r}, to which the base ties it")
    save_tensors({name: value.contiguous() for name, value in state.items() if name not in tied}, out / WEIGHTS)
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _sharing(model: Any, names: Iterable[str]) -> set[str]:
    """Those of some tensors that share their memory with others, and came with them."""
    state, missing = model.state_dict(), set(names)
    held = {value.data_ptr() for name, value in state.items() if name not in missing}
    return {name for name in missing if state[name].data_ptr() in held}


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
