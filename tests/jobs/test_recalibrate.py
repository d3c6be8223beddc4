"""BatchNorm's statistics estimated anew are those of the inputs, through the weights that are there."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from tests import tiny
from tests.jobs.test_images import make
from tests.tiny import EXPERTS, GATE_ORDER, Family
from twinmerge.errors import DataError, RecipeError
from twinmerge.hf.loading import load_backbone
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import build
from twinmerge.jobs.grow import add
from twinmerge.jobs.preflight import checked
from twinmerge.twin.artifact import TwinArtifact

WHOLE = {"rank": 10**4, "bn": "recalibrate"}


def pixels(family: Family, *experts: str) -> Tensor:
    processor = transformers.AutoImageProcessor.from_pretrained(family.base)
    paths = [family.root / f"pictures/{name}{number}.png" for name in experts for number in range(12)]
    found: Tensor = processor(images=[Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]
    return found


def through(model: Any, x: Tensor) -> Any:
    """A model whose BatchNorms hold the statistics of one batch."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            module.train()
    with torch.no_grad():
        model(pixel_values=x)
    return model.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, TwinArtifact]:
    root = tmp_path_factory.mktemp("resnet")
    family = make(root, "resnet")
    recipe = family.recipe(exclusive=WHOLE, router={"samples_per_expert": 12})
    return family, build(recipe, root / "twin")


def test_shared_expert_has_the_statistics_of_all_inputs(made: tuple[Family, TwinArtifact]) -> None:
    family, twin = made
    expected = through(load_backbone(twin.path), pixels(family, *EXPERTS))
    for name, buffer in load_backbone(twin.path).named_buffers():
        if not buffer.is_floating_point():
            continue
        torch.testing.assert_close(buffer, expected.get_buffer(name), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", GATE_ORDER)
def test_expert_has_those_of_its_own_under_its_own_gate(made: tuple[Family, TwinArtifact], name: str) -> None:
    family, twin = made
    x = pixels(family, name)
    own = transformers.ResNetForImageClassification.from_pretrained(family.root / name).eval()
    with torch.no_grad():
        before = own(pixel_values=x).logits
        expected = through(own, x)(pixel_values=x).logits
    found = torch.stack(list(TwinModel.from_pretrained(twin.path)(pixel_values=x, expert=name).logits))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (found - before).norm() > 0.01 * before.norm()
    assert twin.manifest.check is not None
    assert twin.manifest.check.experts[name].distance > 0


def test_new_expert_gets_its_own_and_others_keep_theirs(made: tuple[Family, TwinArtifact], tmp_path: Path) -> None:
    family, twin = made
    more = add(twin.path, "new", model=family.root / "ag", router_data=family.root / "ag.jsonl", out=tmp_path / "more")
    assert more.verify()
    for name in ("model.safetensors", "experts/ag/exclusive.safetensors"):
        assert (more.path / name).read_bytes() == (twin.path / name).read_bytes()
    old, new = twin.exclusive("ag"), more.exclusive("new")
    for name in (n for n in old if "running" in n):
        torch.testing.assert_close(new[name].dense(), old[name].dense(), rtol=1e-4, atol=1e-5)


def test_statistics_of_narrow_weights_are_estimated_in_float32(
    made: tuple[Family, TwinArtifact], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(made[0].root, tmp_path / "models"))
    for folder in (root / "base", *(root / name for name in EXPERTS)):
        tiny.rewrite(
            folder / "model.safetensors",
            lambda state: {n: v.to(torch.bfloat16) if v.is_floating_point() else v for n, v in state.items()},
        )
    twin = build(Family(root).recipe(exclusive=WHOLE, router={"samples_per_expert": 12}), tmp_path / "twin")
    name = "embedder.embedder.normalization.running_mean"
    for expert in EXPERTS:
        ours, theirs = (one.shared.read(name).float() + one.exclusive(expert)[name].dense() for one in (twin, made[1]))
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_inputs_of_which_no_two_share_a_batch_are_refused(made: tuple[Family, TwinArtifact], tmp_path: Path) -> None:
    root = Path(shutil.copytree(made[0].root, tmp_path / "models"))
    settings = json.loads((root / "base" / "preprocessor_config.json").read_text())
    (root / "base" / "preprocessor_config.json").write_text(json.dumps({**settings, "do_resize": False}))
    for expert in EXPERTS:
        for number, path in enumerate(sorted((root / "pictures").glob(f"{expert}*.png"))):
            Image.open(path).resize((16 + number, 20)).save(path)
    recipe = Family(root).recipe(exclusive=WHOLE, router="none")
    with pytest.raises(DataError, match="no two of an expert's have one size; let the processor resize them"):
        build(recipe, tmp_path / "twin")


@pytest.mark.parametrize(
    ("exclusive", "rows", "expected"),
    [
        ({"budget": 8.0}, 100, "recalibrate"),
        ({"budget": 8.0}, 99, "per_expert"),
        ({"rank": 4}, 100, "per_expert"),
        ({"budget": 8.0, "bn": "shared"}, 100, "shared"),
    ],
)
def test_statistics_are_estimated_unasked_under_a_budget_on_enough_inputs(
    made: tuple[Family, TwinArtifact], tmp_path: Path, exclusive: dict[str, Any], rows: int, expected: str
) -> None:
    root = Path(shutil.copytree(made[0].root, tmp_path / "models"))
    for name in EXPERTS:
        lines = (root / f"{name}.jsonl").read_text().splitlines()
        (root / f"{name}.jsonl").write_text("\n".join((lines * 10)[:rows]) + "\n")
    found = checked(Family(root).plan(exclusive={"weighting": "none", **exclusive}))
    assert found.plan.recipe.exclusive.bn == expected


def test_networks_without_batch_norm_have_nothing_to_estimate(family: Any) -> None:
    assert checked(family("bert").plan(exclusive={"budget": 2.0})).plan.recipe.exclusive.bn == "per_expert"


def test_inputs_of_every_expert_are_needed(made: tuple[Family, TwinArtifact], tmp_path: Path) -> None:
    sources: Any = {name: {"model": name} for name in EXPERTS}
    recipe = made[0].recipe(exclusive=WHOLE, router="none").model_copy()
    recipe = type(recipe).model_validate({**recipe.model_dump(), "experts": sources, "root": made[0].root})
    with pytest.raises(RecipeError, match=r"exclusive.bn: recalibrate runs inputs of every expert, and experts.trec"):
        build(recipe, tmp_path / "twin")
