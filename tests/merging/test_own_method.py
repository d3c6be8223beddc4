"""A merge method of somebody else's, in one file outside the package, works wherever ours do."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from tests.merging.memory import State
from tests.merging.own_method import Quietest
from tests.tiny import EXPERTS, GATE_ORDER, LABELS, Family, text_rows
from twinmerge.cli import main
from twinmerge.errors import RecipeError
from twinmerge.eval.harness import run_suite
from twinmerge.eval.suite import Suite
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.merging import method as registry
from twinmerge.merging.recipe import load_merge

Get = Callable[[str], Family]
del registry._registered["quietest"]  # tests of other files list the methods
WEIGHTS = {"ag": 1.0, "sms": 0.5, "trec": -2.0}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registered, "quietest", Quietest)


def read(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.specs}


def expected(base: State, experts: dict[str, State], weights: dict[str, float], pull: float, loudest: bool) -> State:
    """Entry by entry, slowly."""
    merged = {}
    for name, start in base.items():
        flat = start.flatten().double()
        moved = [weights[e] * (state[name] - start).flatten() for e, state in sorted(experts.items())]
        for i in range(len(flat)):
            values = sorted((float(vector[i]) for vector in moved), key=abs)
            flat[i] += pull * values[-1 if loudest else 0]
        merged[name] = flat.view(start.shape).float()
    return merged


def equal(found: State, wanted: State) -> bool:
    return all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in wanted.items())


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_method_is_one_file_of_at_most_forty_lines() -> None:
    assert len(Path(inspect.getfile(Quietest)).read_text().splitlines()) <= 40


def test_own_method_merges_and_is_a_merge_method_of_mergekits_recipes(family: Get, tmp_path: Path) -> None:
    root = family("gpt2").root
    base, experts = read(root / "base"), {name: read(root / name) for name in EXPERTS}
    shared = {"method": "quietest", "weight": WEIGHTS, "pull": 0.5}
    sources = {"base": str(root / "base"), "experts": {name: str(root / name) for name in EXPERTS}}
    ours = write(tmp_path / "ours.yaml", {**sources, "shared": shared})
    models = [{"model": str(root / name), "parameters": {"weight": WEIGHTS[name]}} for name in EXPERTS]
    parameters = {"pull": [0.5, 0.5], "loudest": True}
    theirs = {"merge_method": "quietest", "base_model": str(root / "base"), "models": models, "parameters": parameters}
    kit = write(tmp_path / "kit.yaml", theirs)
    assert main(["merge", str(ours), "--out", str(tmp_path / "ours")]) == 0
    assert main(["merge", str(kit), "--out", str(tmp_path / "kit")]) == 0
    assert equal(read(tmp_path / "ours"), expected(base, experts, WEIGHTS, 0.5, loudest=False))
    assert equal(read(tmp_path / "kit"), expected(base, experts, WEIGHTS, 0.5, loudest=True))
    assert json.loads((tmp_path / "kit" / "merge.json").read_text())["recipe"]["method"] == "quietest"


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"pull": "far"}, "kit.yaml:7: parameters.pull: must be a number, found 'far'"),
        ({"loudest": 3}, "kit.yaml:7: parameters.loudest: input should be a valid boolean, found 3"),
        ({"pull": [0, 1]}, r"parameters.pull: Value error, 0 pulls nowhere, found 0.0, for tensor 'embed.w'"),
        ({"pul": 1}, "kit.yaml:7: unknown key 'pul' under parameters; did you mean 'pull'"),
    ],
)
def test_wrong_settings_of_an_own_method_in_a_mergekit_recipe_are_named(
    tmp_path: Path, parameters: dict[str, Any], words: str
) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    content = {"merge_method": "quietest", "base_model": "b", "models": [{"model": "a"}], "parameters": parameters}
    text = "".join(yaml.safe_dump({key: value}) for key, value in content.items())
    (tmp_path / "kit.yaml").write_text(f"# a comment\n{text}")
    with pytest.raises(RecipeError, match=words.replace(":7:", ":[67]:")):
        load_merge(tmp_path / "kit.yaml").methods.at("embed.w", 0.0)


def test_own_method_makes_a_twins_shared_expert_and_contends_in_a_suite(family: Get, tmp_path: Path) -> None:
    root = family("bert").root
    base = read(root / "base")
    experts = {name: {key: read(root / name)[f"bert.{key}"] for key in base} for name in EXPERTS}
    wanted = expected(base, experts, dict.fromkeys(EXPERTS, 1.0), 1.0, loudest=False)
    sources = {name: {"model": str(root / name), "router_data": str(root / f"{name}.jsonl")} for name in EXPERTS}
    content = {"base": str(root / "base"), "experts": sources, "shared": {"method": "quietest"}}
    recipe = write(tmp_path / "twin.yaml", {**content, "exclusive": {"rank": 1}, "router": {"features": "tokens"}})
    assert main(["build", str(recipe), "--out", str(tmp_path / "twin")]) == 0
    assert equal(read(tmp_path / "twin"), wanted)

    for name in EXPERTS:
        rows = [{**row, "label": f"LABEL_{i % LABELS[name]}"} for i, row in enumerate(text_rows(name, 12))]
        for split in ("router", "validation", "test"):
            (tmp_path / f"{name}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    contestants = {
        "experts": {"title": "experts", "kind": "experts"},
        "own": {"title": "own", "kind": "static", "shared": {"method": "quietest", "pull": 0.9}},
        "twin": {"title": "twin", "kind": "twin", "shared": {"method": "quietest"}, "exclusive": {"rank": 1}},
    }
    suite = Suite.model_validate(
        {
            "name": "own",
            "root": str(tmp_path),
            "base": str(root / "base"),
            "experts": str(root / "{task}"),
            "data": "{task}.{split}.jsonl",
            "tasks": {name: {} for name in GATE_ORDER},
            "shared": {"method": "quietest"},
            "router": {"features": "tokens"},
            "seeds": [0],
            "contestants": contestants,
        }
    )
    result = run_suite(suite, tmp_path / "results")
    methods = {entry.name: entry.settings["shared.method"] for entry in result.contestants}
    assert methods == {"experts": "pretrained", "own": "quietest", "twin": "quietest"}
