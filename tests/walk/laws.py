"""The laws of a twin on one class of transformers: a tiny base, two experts, everything kept, one mixed batch."""

import copy
import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests.walk.small import CannotBeMadeError, inputs_for, small_model
from twinmerge.errors import InputError
from twinmerge.hf.classes import LIBRARY
from twinmerge.hf.heads import load_head
from twinmerge.hf.loading import load_backbone
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import kinds_of, new_manifest
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.twin.decompose import write_weights
from twinmerge.twin.plan import make_plan
from twinmerge.twin.recipe import Recipe

Way = Literal["fast", "partly", "refused", "not made", "wrong"]
TOLERANCE = 2e-3
"""Of the distance between the two experts' outputs: float32 sums in another order, through norms, gates and top-k's."""


@dataclass(frozen=True)
class Outcome:
    """What the walk found of one class."""

    kind: str
    name: str
    way: Way
    fallback: int = 0
    """Parameters and buffers that go by the exact fall-back, of `parameters`."""
    parameters: int = 0
    expert: float = 0.0
    """One-hot gate against the expert, relative to the distance of the two experts."""
    alone: float = 0.0
    merged: float = 0.0
    reason: str = ""


def walk_class(kind: str, name: str, folder: Path) -> Outcome:
    """Try one class; the folder is made and removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        return _walk(kind, name, folder)
    except CannotBeMadeError as error:
        return Outcome(kind, name, "not made", reason=str(error))
    except InputError as error:
        return Outcome(kind, name, "refused", reason=str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def quiet_worker() -> None:
    """One thread, and no word of transformers."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


def _walk(kind: str, name: str, folder: Path) -> Outcome:
    model = small_model(name)
    inputs = inputs_for(model, kind)
    try:
        with torch.inference_mode():
            model(**inputs)
    except Exception as error:  # whatever a class raises on plain inputs: it is not walked
        raise CannotBeMadeError(f"forward: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    experts = _write(model, kind, folder)
    twin = _twin(folder)
    own = [expert(**inputs).logits.detach() for expert in experts]
    apart = float((own[0] - own[1]).norm())
    gate = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.0, 1.0]])
    together = _logits(twin, gate, inputs)
    expert = max(_off(together[0], own[0][0]), _off(together[2], own[1][2])) / apart * len(own[0])
    rows = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(len(gate))]
    alone = max(_off(_logits(twin, gate[i : i + 1], rows[i])[0], together[i]) for i in range(len(gate))) / apart
    with torch.inference_mode():
        merged = (
            max(_off(twin.materialize(gate[i])(**rows[i]).logits[0], together[i]) for i in range(len(gate))) / apart
        )
    ways = twin.paths()
    slow = sum(way == "fallback" for way in ways.values())
    right = max(expert, alone, merged) <= TOLERANCE
    way: Way = "wrong" if not right else "partly" if slow else "fast"
    return Outcome(kind, name, way, slow, len(ways), expert, alone, merged)


def _off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm())


def _logits(twin: TwinModel, gate: Tensor, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    return list(twin(gate=gate, **inputs).logits)


def _write(model: PreTrainedModel, kind: str, folder: Path) -> list[PreTrainedModel]:
    """Base and experts: every float parameter and buffer moves; classifiers have heads of their own."""
    base: Any = model if kind in ("causal", "seq2seq") else model.base_model
    base.save_pretrained(folder / "base")
    experts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expert = copy.deepcopy(model)
        with torch.no_grad():
            for tensor in [*expert.parameters(), *(b for n, b in expert.named_buffers() if n in expert.state_dict())]:
                if tensor.is_floating_point():
                    spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
                    tensor += 0.1 * (spread or 0.1) * torch.rand_like(tensor)
        expert.save_pretrained(folder / f"expert{seed}")
        (folder / f"expert{seed}.jsonl").write_text(json.dumps({"text": "w"}) + "\n", encoding="utf-8")
        cls: Any = getattr(transformers, type(model).__name__)
        experts.append(cls.from_pretrained(folder / f"expert{seed}", dtype=torch.float32).eval())
    return experts


def _twin(folder: Path) -> TwinModel:
    sources = {f"expert{s}": {"model": f"expert{s}", "router_data": f"expert{s}.jsonl"} for s in (1, 2)}
    exclusive = {"rank": 10**6, "embeddings": "exclusive"}
    recipe = Recipe(base="base", experts=sources, shared={"method": "average"}, exclusive=exclusive, root=folder)
    plan = make_plan(recipe, LIBRARY, kinds_of)
    (folder / "twin").mkdir()
    (folder / "work").mkdir()
    report = write_weights(plan, folder / "twin", folder / "work")
    artifact = TwinArtifact(folder / "twin", new_manifest(plan, report, folder / "twin"))
    heads = {name: load_head(*head) for name in artifact.expert_names if (head := artifact.head(name))}
    parts = {name: artifact.exclusive(name) for name in artifact.expert_names}
    return TwinModel(load_backbone(artifact.path), parts, heads=heads)
