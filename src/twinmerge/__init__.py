"""Twin-Merging: one shared expert, small exclusive parts, a router that mixes them for every input."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinmerge.errors import InputError, TwinMergeError
    from twinmerge.hf.batches import Writing
    from twinmerge.hf.heads import TwinOutput
    from twinmerge.hf.model import TwinModel
    from twinmerge.jobs.build import build
    from twinmerge.jobs.export import export
    from twinmerge.jobs.grow import add, remove, replace
    from twinmerge.jobs.modules import build_from_state_dicts
    from twinmerge.jobs.predict import predict
    from twinmerge.runtime.module import TwinModule
    from twinmerge.runtime.wrapped import Wrapped, WrappedOutput, wrap
    from twinmerge.twin.artifact import TwinArtifact
    from twinmerge.twin.recipe import Recipe

__version__ = "0.1.0"

_HOMES = {
    "InputError": "twinmerge.errors",
    "Recipe": "twinmerge.twin.recipe",
    "TwinArtifact": "twinmerge.twin.artifact",
    "TwinMergeError": "twinmerge.errors",
    "TwinModel": "twinmerge.hf.model",
    "TwinModule": "twinmerge.runtime.module",
    "TwinOutput": "twinmerge.hf.heads",
    "add": "twinmerge.jobs.grow",
    "Wrapped": "twinmerge.runtime.wrapped",
    "WrappedOutput": "twinmerge.runtime.wrapped",
    "Writing": "twinmerge.hf.batches",
    "build": "twinmerge.jobs.build",
    "build_from_state_dicts": "twinmerge.jobs.modules",
    "export": "twinmerge.jobs.export",
    "predict": "twinmerge.jobs.predict",
    "remove": "twinmerge.jobs.grow",
    "replace": "twinmerge.jobs.grow",
    "wrap": "twinmerge.runtime.wrapped",
}

__all__ = [
    "InputError",
    "Recipe",
    "TwinArtifact",
    "TwinMergeError",
    "TwinModel",
    "TwinModule",
    "TwinOutput",
    "Wrapped",
    "WrappedOutput",
    "Writing",
    "__version__",
    "add",
    "build",
    "build_from_state_dicts",
    "export",
    "predict",
    "remove",
    "replace",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import twinmerge` is cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'twinmerge' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Lazy names too, for completion."""
    return sorted({*globals(), *__all__})
