"""Exclusive knowledge of LoRA experts: from factors through QR, the same as from dense differences."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests import tiny
from tests.tiny import EXPERTS, Family
from tests.twin.test_decompose import dense, expert_state, written
from twinmerge.tensors.low_rank import LowRank
from twinmerge.twin import shared as shared_module
from twinmerge.twin.shared import merge_parameter, prepare

# ---- LoRA experts


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Family]:
    """LoRA experts, and the same as full fine-tunes."""
    found, merged = tiny.adapter_family(tmp_path_factory.mktemp("adapters"))
    root = tmp_path_factory.mktemp("full")
    shutil.copytree(found.base, root / "base")
    for name, model in merged.items():
        _save(model, root / name)
        shutil.copy(found.root / f"{name}.jsonl", root)
    return found, Family(root)


def _save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)


@pytest.mark.parametrize("rank", [2, 5, 64])
@pytest.mark.parametrize("shared", [{"method": "average"}, {"method": "task_arithmetic", "scaling": "auto"}])
def test_lora_through_qr_is_the_dense_svd(
    adapters: tuple[Family, Family], tmp_path: Path, shared: dict[str, Any], rank: int
) -> None:
    exclusive = {"rank": rank, "embeddings": "exclusive"}
    plans = [found.plan(shared=shared, exclusive=exclusive) for found in adapters]
    assert [plan.experts["sms"].is_adapter for plan in plans] == [True, False]
    (lora, lora_report), (full, full_report) = (written(plan, tmp_path / str(i)) for i, plan in enumerate(plans))
    for expert in EXPERTS:
        ours, theirs = lora.exclusive(expert), full.exclusive(expert)
        for task in plans[0].tasks:
            base = plans[0].base.read(task.name)
            assert torch.allclose(lora.shared.read(task.name), full.shared.read(task.name), atol=1e-6)
            found, expected = (
                dense(parts[task.name], base) if task.name in parts else torch.zeros_like(base)
                for parts in (ours, theirs)
            )
            # two ways to the same truncation in float32; PEFT's merge has rounded the full ones once more
            assert torch.allclose(found, expected, atol=3e-6), task.name
        kept = [report.experts[expert]["energy_kept"] for report in (lora_report, full_report)]
        assert kept[0] == pytest.approx(kept[1], abs=1e-4)


def test_rank_of_a_lora_difference_is_at_most_that_of_all_factors(
    adapters: tuple[Family, Family], tmp_path: Path
) -> None:
    plan = adapters[0].plan(shared={"method": "average"})
    artifact, _ = written(plan, tmp_path)
    part = artifact.exclusive("trec")["encoder.layer.0.attention.self.query.weight"]
    assert isinstance(part, LowRank)
    assert part.rank == 8  # trec 4, sms 4; ag trains the keys


def test_matrix_that_no_adapter_trains_has_no_exclusive_part(adapters: tuple[Family, Family], tmp_path: Path) -> None:
    artifact, report = written(adapters[0].plan(shared={"method": "average"}), tmp_path)
    assert "embeddings.position_embeddings.weight" not in artifact.exclusive("trec")
    assert report.tensors["embeddings.position_embeddings.weight"]["ranks"] == {}


def test_no_budget_is_kept_for_what_no_adapter_trains(adapters: tuple[Family, Family]) -> None:
    lora, full = (found.plan(exclusive={"budget": 3}) for found in adapters)
    assert lora.vector_bytes < full.vector_bytes
    assert (lora.budget_bytes or 0) > (full.budget_bytes or 0)
    assert all(task.experts for task in lora.tasks if any(e.trains(task.name) for e in lora.experts.values()))


@pytest.mark.parametrize("entries", [13, 100])
@pytest.mark.parametrize("method", [{"method": "average"}, {"method": "ties"}, {"method": "sce"}, {"method": "tsv_m"}])
def test_adapters_are_merged_in_stretches_of_any_size(
    adapters: tuple[Family, Family], monkeypatch: pytest.MonkeyPatch, entries: int, method: dict[str, Any]
) -> None:
    """No matrix of an adapter's pair is made, and the sums are those of whole matrices."""
    plan = adapters[0].plan(shared=method)
    whole = prepare(plan)
    for task in [task for task in plan.tasks if task.experts][:6]:
        expected = merge_parameter(task, plan, whole)[0]
        monkeypatch.setattr(shared_module, "_ADAPTED_ENTRIES", entries)
        found = merge_parameter(task, plan, prepare(plan))[0]
        monkeypatch.undo()
        assert torch.allclose(found, expected, atol=1e-6), task.name


@pytest.mark.parametrize(
    "settings",
    [
        {"shared": {"method": "ties", "density": 1.0}},
        {
            "shared": {"method": "average"},
            "exclusive": {"compression": "magnitude", "density": 1.0, "embeddings": "exclusive"},
        },
    ],
)
def test_lora_experts_go_through_the_dense_difference_where_factors_do_not_serve(
    adapters: tuple[Family, Family], tmp_path: Path, settings: dict[str, Any]
) -> None:
    plan = adapters[0].plan(**settings)
    artifact, _ = written(plan, tmp_path)
    for expert in EXPERTS:
        parts = artifact.exclusive(expert)
        for name, tensor in expert_state(plan, expert).items():
            exclusive = dense(parts[name], tensor) if name in parts else 0.0
            assert torch.allclose(artifact.shared.read(name) + exclusive, tensor, atol=1e-6)


def test_matrix_that_one_adapter_saves_whole_goes_through_the_dense_difference(tmp_path: Path) -> None:
    import transformers

    family, _ = tiny.adapter_family(tmp_path / "family")
    model = transformers.BertForSequenceClassification.from_pretrained(family.base)
    saved = ["pooler", "classifier"]
    tiny.make_adapter(
        family.root, "sms", model, r=2, target_modules=["key"], modules_to_save=saved, task_type="SEQ_CLS"
    )
    plan = family.plan(shared={"method": "average"})
    artifact, _ = written(plan, tmp_path)
    for expert in EXPERTS:
        name = "pooler.dense.weight"
        tensor = expert_state(plan, expert)[name]
        rebuilt = artifact.shared.read(name) + dense(artifact.exclusive(expert)[name], tensor)
        assert torch.allclose(rebuilt, tensor, atol=1e-6)
