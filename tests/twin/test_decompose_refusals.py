"""Weights that cannot become a twin are refused by name, and what is read stays as it is."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny import Family, rewrite
from tests.twin.test_decompose import Get, written
from twinmerge.errors import CheckpointError, InputError, MismatchError
from twinmerge.models.compatible import Allow
from twinmerge.twin.plan import Plan
from twinmerge.twin.shared import require_fine_tunes

# ---- what is refused


@pytest.fixture
def bert(family: Get, tmp_path: Path) -> Family:
    return Family(shutil.copytree(family("bert").root, tmp_path / "bert"))


def refused(plan: Plan, folder: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        written(plan, folder)
    assert "\n" not in str(caught.value)
    return caught.value


def test_expert_with_unrelated_weights_is_refused_with_the_distance(bert: Family) -> None:
    rewrite(bert.root / "sms" / "model.safetensors", lambda t: {k: torch.randn_like(v) for k, v in t.items()})
    words = r"'sms' is no fine-tune of this base: .* must be at least 0\.5, found \S+ \(relative distance \d"
    with pytest.raises(MismatchError, match=words):
        require_fine_tunes(bert.plan())
    require_fine_tunes(replace(bert.plan(), allow=Allow(unrelated=True)))


def test_expert_far_from_the_base_is_still_a_fine_tune(bert: Family, tmp_path: Path) -> None:
    def move(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v + 0.7 * v.std() * torch.randn_like(v) if v.numel() > 1 else v for k, v in tensors.items()}

    rewrite(bert.root / "sms" / "model.safetensors", move)
    require_fine_tunes(bert.plan())
    written(bert.plan(), tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "bert.encoder.layer.0.attention.self.query.weight",  # the check of relatedness reads it
        "bert.embeddings.LayerNorm.bias",  # it does not
        "bert.embeddings.word_embeddings.weight",
        "classifier.weight",
    ],
)
def test_value_that_is_no_number_is_refused_wherever_it_is(bert: Family, tmp_path: Path, name: str) -> None:
    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name].view(-1)[-1] = float("nan")
        return tensors

    rewrite(bert.root / "sms" / "model.safetensors", damage)
    error = refused(bert.plan(), tmp_path)
    assert isinstance(error, CheckpointError)
    assert f"expert 'sms': {name!r} in " in str(error)
    assert "has 1 NaN or Inf values, first at index" in str(error)


@pytest.mark.parametrize("name", ["encoder.layer.0.attention.self.query.weight", "pooler.dense.bias"])
def test_base_with_a_value_that_is_no_number_is_refused(bert: Family, tmp_path: Path, name: str) -> None:
    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name].view(-1)[0] = float("inf")
        return tensors

    rewrite(bert.base / "model.safetensors", damage)
    assert f"base: {name!r} in " in str(refused(bert.plan(), tmp_path))
