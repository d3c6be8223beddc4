"""Lists every merge method of the registry: its paper, what it is told, what it must see, where it may stand."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from twinmerge.merging.method import Knowledge, Use, find_method, method_names


@dataclass(frozen=True)
class System:
    """One method, as `twinmerge methods` shows it."""

    name: str
    summary: str
    paper: str
    protocol: Knowledge
    data: str
    uses: tuple[Use, ...]
    options: dict[str, Any]
    """Settings and their defaults; of one that must be said, `required`."""


def systems() -> list[System]:
    """Every method, in the order of the registry.

    Raises:
        RecipeError: if a method of another package cannot be imported.
    """
    found = []
    for name in method_names():
        method = find_method(name)
        options = {
            key: "required" if info.is_required() else info.get_default(call_default_factory=True)
            for key, info in method.model_fields.items()
            if key != "method"
        }
        summary = (inspect.getdoc(method) or "").split("\n", 1)[0]
        found.append(System(name, summary, method.paper, method.protocol, method.data, method.uses, options))
    return found
