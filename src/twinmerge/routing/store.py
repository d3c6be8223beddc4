"""Writes a router to router.json and router.safetensors and reads it back, to the bit; no pickle."""

import json
from pathlib import Path

from twinmerge.errors import ArtifactError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.writer import save_tensors
from twinmerge.routing.combined import assemble
from twinmerge.routing.router import Router
from twinmerge.twin.recipe import RouterSettings

_RENAMED = {
    "share": "ngrams.share",
    "first_temperature": "ngrams.temperature",
    "certainty": "ngrams.certainty",
}
"""What the file calls otherwise than the code; besides, the file knows no nesting."""
_BEFORE = {"gate": "soft", "detector": "distance"}
"""How routers were made whose files do not say it."""
_GONE = "one_pass"
"""A setting of older files: where it was true, low layers went without their exclusive parts."""


def save_router(router: Router, folder: Path) -> None:
    """Write a router into a new folder."""
    folder.mkdir()
    tensors = {_in_file(name): tensor.contiguous() for name, tensor in router.state_dict().items()}
    save_tensors(tensors, folder / "router.safetensors")
    content = {"expert_names": router.expert_names, "settings": router.settings.model_dump(), "report": router.report}
    (folder / "router.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load_router(folder: Path) -> Router:
    """Read a router back.

    Raises:
        ArtifactError: if the files lack something.
    """
    content = json.loads((folder / "router.json").read_text(encoding="utf-8"))
    settings, checkpoint = _BEFORE | content["settings"], Checkpoint.open(folder / "router.safetensors")
    tensors = {name: checkpoint.read(name) for name in checkpoint.specs}
    router = assemble(
        content["expert_names"],
        RouterSettings.model_validate({k: v for k, v in settings.items() if k != _GONE}),
        feature_size=len(tensors.get("mean", ())),
        stored_rows=len(tensors.get("head.labels", ())),
        ngrams=len(tensors.get("ngrams.keys", ())),
    )
    wanted = {name: _in_file(name) for name in router.state_dict()}
    lacking = sorted(set(wanted.values()) - set(tensors))
    if lacking:
        raise ArtifactError(f"{folder / 'router.safetensors'} lacks {lacking[0]!r}; the twin must be built again")
    router.load_state_dict({name: tensors[stored] for name, stored in wanted.items()})
    router.report = content["report"]
    return router.eval()


def _in_file(name: str) -> str:
    """The name in the file of a tensor of `Router.state_dict`."""
    flat = ".".join(part for part in name.split(".") if part not in ("scorer", "hidden", "tokens"))
    return _RENAMED.get(flat, flat)
