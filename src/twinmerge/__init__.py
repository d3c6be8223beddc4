"""Twin-Merging: one shared expert, small exclusive parts, a router that mixes them for every input."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinmerge.errors import InputError, TwinMergeError
    from twinmerge.runtime.build import build
    from twinmerge.runtime.export import export
    from twinmerge.runtime.grow import add, remove, replace
    from twinmerge.runtime.model import TwinModel, TwinOutput
    from twinmerge.runtime.predict import predict
    from twinmerge.twin.artifact import TwinArtifact
    from twinmerge.twin.recipe import Recipe

__version__ = "0.1.0"

_HOMES = {
    "InputError": "twinmerge.errors",
    "Recipe": "twinmerge.twin.recipe",
    "TwinArtifact": "twinmerge.twin.artifact",
    "TwinMergeError": "twinmerge.errors",
    "TwinModel": "twinmerge.runtime.model",
    "TwinOutput": "twinmerge.runtime.model",
    "add": "twinmerge.runtime.grow",
    "build": "twinmerge.runtime.build",
    "export": "twinmerge.runtime.export",
    "predict": "twinmerge.runtime.predict",
    "remove": "twinmerge.runtime.grow",
    "replace": "twinmerge.runtime.grow",
}

__all__ = [
    "InputError",
    "Recipe",
    "TwinArtifact",
    "TwinMergeError",
    "TwinModel",
    "TwinOutput",
    "__version__",
    "add",
    "build",
    "export",
    "predict",
    "remove",
    "replace",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import twinmerge` is cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'twinmerge' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Lazy names too, for completion."""
    return sorted({*globals(), *__all__})
