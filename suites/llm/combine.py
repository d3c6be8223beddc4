"""Combines adapters as PEFT itself does, by its add_weighted_adapter: a rival of the twin."""

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
from transformers import AutoModelForCausalLM

from suites.running import quiet_transformers


def combine(base: Path, adapters: Sequence[Path], target: Path) -> None:
    """Write the mean of adapters as one adapter of their rank, factor by factor (`combination_type="linear"`).

    Args:
        base: the model that they adapt.
        adapters: folders of PEFT, of equal rank.
        target: the folder to make, put into place once it is whole.
    """
    quiet_transformers()
    names = [path.name for path in adapters]
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT, about an old name in transformers
        model = peft.PeftModel.from_pretrained(model, str(adapters[0]), adapter_name=names[0])
        for name, path in zip(names[1:], adapters[1:], strict=True):
            model.load_adapter(str(path), adapter_name=name)
    model.add_weighted_adapter(names, [1 / len(names)] * len(names), target.name, combination_type="linear")
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, selected_adapters=[target.name])
    (temporary / target.name).replace(target)
    shutil.rmtree(temporary)
