"""From weights to a twin: the laws of exclusive knowledge on stored tensors, bytes, and what is refused on the way."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference, tiny
from tests.tiny import EXPERTS, Family, rewrite
from twinmerge.errors import CheckpointError
from twinmerge.files import writer
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.hashes import sha256_of
from twinmerge.files.writer import copy_side_files
from twinmerge.jobs.build import new_manifest
from twinmerge.models.compatible import Allow
from twinmerge.tensors.low_rank import LowRank
from twinmerge.tensors.parts import Part, of_form
from twinmerge.tensors.sparse import Sparse
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.twin.decompose import WeightsReport, decompose_tensor, write_weights
from twinmerge.twin.manifest import write_manifest
from twinmerge.twin.plan import Plan
from twinmerge.twin.shared import merge_parameter, prepare

Get = Callable[[str], Family]
WHOLE = {"rank": 64, "embeddings": "exclusive"}


def written(plan: Plan, folder: Path) -> tuple[TwinArtifact, WeightsReport]:
    """The weights of a twin without a router."""
    (folder / "twin").mkdir(parents=True)
    (folder / "work").mkdir()
    report = write_weights(plan, folder / "twin", folder / "work")
    write_manifest(folder / "twin", new_manifest(plan, report, folder / "twin"))
    return TwinArtifact.open(folder / "twin"), report


def dense(part: Part, like: Tensor) -> Tensor:
    return part.dense().reshape(like.shape)


def state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.specs}


def expert_state(plan: Plan, expert: str) -> dict[str, Tensor]:
    """The expert's values under the base's names."""
    base = state(plan.base)
    return {
        task.name: base[task.name] + plan.experts[expert].task_vector(task.name, base[task.name])
        for task in plan.tasks
        if task.experts
    }


# ---- the shared expert


@pytest.mark.parametrize(
    ("shared", "expected"),
    [
        ({"method": "average"}, reference.average),
        (
            {"method": "task_arithmetic", "scaling": 0.3},
            lambda base, experts: reference.task_arithmetic(base, experts, 0.3),
        ),
        ({"method": "ties", "density": 0.5}, lambda base, experts: reference.ties(base, experts, 0.5, 1.0)),
    ],
)
def test_shared_expert_is_the_merge_of_the_reference(
    family: Get, shared: dict[str, Any], expected: Callable[..., Mapping[str, Tensor]]
) -> None:
    plan = family("distilbert").plan(shared=shared)
    statistics = prepare(plan)
    found = {task.name: merge_parameter(task, plan, statistics)[0] for task in plan.tasks}
    base = {name: tensor.double() for name, tensor in state(plan.base).items()}
    experts = {name: {k: v.double() for k, v in expert_state(plan, name).items()} for name in EXPERTS}
    for name, tensor in expected(base, experts).items():
        assert torch.allclose(found[name].double(), tensor, atol=1e-6)  # float32, rounded once


def test_scaling_is_found_for_every_tensor_and_reported(family: Get, tmp_path: Path) -> None:
    auto = {"method": "task_arithmetic", "scaling": "auto"}
    _, report = written(family("bert").plan(shared=auto, exclusive={"rank": 2}), tmp_path)
    scalings = {name: entry["scaling"] for name, entry in report.tensors.items()}
    assert len(set(scalings.values())) > 3
    assert all(0 <= scaling <= 1 for scaling in scalings.values())
    assert all(scaling == round(scaling, 4) for scaling in scalings.values())


@pytest.mark.parametrize(
    ("shared", "scaling"), [({"method": "average"}, None), ({"method": "ties", "scaling": 0.5}, 0.5)]
)
def test_scaling_that_was_given_is_reported_as_it_is(
    family: Get, tmp_path: Path, shared: dict[str, Any], scaling: float | None
) -> None:
    _, report = written(family("bert").plan(shared=shared, exclusive={"rank": 1}), tmp_path)
    assert {entry["scaling"] for entry in report.tensors.values()} == {scaling}


@pytest.mark.parametrize("exclusive", [{"rank": 2}, {"budget": 2.0}, {"energy": 0.5}])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_auto_scaling_serves_every_method_and_policy(
    family: Get, tmp_path: Path, method: str, exclusive: dict[str, Any]
) -> None:
    shared = {"method": method, "scaling": "auto"}
    artifact, report = written(family("distilbert").plan(shared=shared, exclusive=exclusive), tmp_path)
    assert all(entry["scaling"] is not None for entry in report.tensors.values())
    assert artifact.verify() > 0


def test_auto_scaling_leaves_less_residual_energy_than_the_papers_and_the_mean(family: Get, tmp_path: Path) -> None:
    left = {}
    for scaling in ("auto", 0.3, 1 / 3):
        shared = {"method": "task_arithmetic", "scaling": scaling}
        plan = family("bert").plan(shared=shared, exclusive={"rank": 2, "embeddings": "exclusive"})
        _, report = written(plan, tmp_path / str(scaling))
        left[scaling] = sum(entry["energy"] * (1 - entry["energy_kept"]) for entry in report.experts.values())
    # each tensor's choice is at least as good, to float32 sums of squares
    assert left["auto"] <= min(left.values()) * (1 + 1e-3)


@pytest.mark.parametrize("name", ["embeddings.word_embeddings.weight", "embeddings.LayerNorm.bias"])
def test_a_merged_value_too_large_for_the_dtype_of_the_base_is_refused_as_merge_does(tmp_path: Path, name: str) -> None:
    made = tiny.make_family(tmp_path, tiny.bert().half(), tiny.transformers.BertForSequenceClassification)
    for expert in EXPERTS:
        rewrite(
            made.root / expert / "model.safetensors",
            lambda tensors: {n: t.fill_(60000.0) if n == f"bert.{name}" else t for n, t in tensors.items()},
        )
    plan = made.plan(shared={"method": "task_arithmetic", "scaling": 1.0}, exclusive={"rank": 1})
    plan = replace(plan, allow=Allow(unrelated=True))
    with pytest.raises(CheckpointError, match=f"'{name}': the merged values go up to 1.8e.05, more than torch.float16"):
        written(plan, tmp_path / "out")


# ---- the laws


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "roberta"])
@pytest.mark.parametrize("method", ["average", "dare_ties"])
def test_shared_plus_whole_exclusive_is_the_expert(family: Get, tmp_path: Path, name: str, method: str) -> None:
    plan = family(name).plan(shared={"method": method})
    artifact, report = written(plan, tmp_path)
    for expert in EXPERTS:
        parts = artifact.exclusive(expert)
        for parameter, tensor in expert_state(plan, expert).items():
            rebuilt = artifact.shared.read(parameter) + dense(parts[parameter], tensor)
            assert torch.allclose(rebuilt, tensor, atol=1e-6)  # factors are stored in float32
        assert report.experts[expert]["energy_kept"] == pytest.approx(1.0, abs=1e-6)


def test_rank_zero_leaves_vectors_only(family: Get, tmp_path: Path) -> None:
    plan = family("bert").plan(exclusive={"rank": 0, "embeddings": "exclusive"})
    artifact, report = written(plan, tmp_path)
    vectors = {task.name for task in plan.tasks if task.kind == "vector"}
    for expert in EXPERTS:
        assert artifact.exclusive(expert).keys() == vectors
        assert not (artifact.path / "experts" / expert / "adapter_model.safetensors").exists()
        assert report.experts[expert]["rank_max"] == 0
        assert 0 < report.experts[expert]["energy_kept"] < 0.5


def test_rank_is_that_of_every_matrix(family: Get, tmp_path: Path) -> None:
    plan = family("bert").plan(exclusive={"rank": 3, "embeddings": "exclusive"})
    artifact, report = written(plan, tmp_path)
    for expert in EXPERTS:
        pairs = of_form(artifact.exclusive(expert), LowRank)
        assert pairs
        assert all(part.rank == min(3, *part.shape) for part in pairs.values())
        assert report.experts[expert]["rank_max"] == 3


@pytest.mark.parametrize("energy", [0.5, 0.9])
def test_energy_is_reached_in_every_matrix(family: Get, tmp_path: Path, energy: float) -> None:
    plan = family("bert").plan(exclusive={"energy": energy, "embeddings": "exclusive"})
    artifact, report = written(plan, tmp_path)
    for expert in EXPERTS:
        parts = artifact.exclusive(expert)
        for name, tensor in expert_state(plan, expert).items():
            difference = tensor - artifact.shared.read(name)
            kept = dense(parts[name], tensor).square().sum() / difference.square().sum()
            assert kept >= energy - 1e-4  # float32 factors
        assert report.experts[expert]["energy_kept"] >= energy


@pytest.mark.parametrize("budget", [1.6, 2.0, 3.0])
def test_budget_is_respected_by_the_files_and_nearly_used(family: Get, tmp_path: Path, budget: float) -> None:
    plan = family("bert").plan(exclusive={"budget": budget, "embeddings": "exclusive"})
    artifact, report = written(plan, tmp_path)
    files = [path for path in (artifact.path / "experts").rglob("*.safetensors") if path.parent.name != "head"]
    used = sum(path.stat().st_size for path in files)
    assert used <= budget * plan.base.nbytes
    # what is not used: at most one direction, and headers that turned out shorter than their bound
    headers = sum(task.header_bytes * 2 * 3 for task in plan.tasks)
    assert used >= budget * plan.base.nbytes - headers - 4 * (64 + 16)
    assert sum(entry["rank_mean"] for entry in report.experts.values()) > 0


def test_more_budget_keeps_more_energy(family: Get, tmp_path: Path) -> None:
    kept = []
    for budget in (1.6, 2.0, 2.6):
        _, report = written(family("bert").plan(exclusive={"budget": budget, "dtype": None}), tmp_path / str(budget))
        kept.append(sum(entry["energy_kept"] for entry in report.experts.values()))
    assert kept == sorted(kept)
    assert len(set(kept)) == 3


@pytest.mark.parametrize("compression", ["magnitude", "random"])
def test_sparse_compression_is_that_of_the_entries(family: Get, tmp_path: Path, compression: str) -> None:
    plan = family("bert").plan(exclusive={"compression": compression, "density": 0.5, "embeddings": "exclusive"})
    artifact, report = written(plan, tmp_path)
    for expert in EXPERTS:
        tensors = expert_state(plan, expert)
        for name, part in artifact.exclusive(expert).items():
            tensor = tensors[name]
            difference = tensor - artifact.shared.read(name)
            found = dense(part, tensor)
            expected = difference / (0.5 if compression == "random" and isinstance(part, Sparse) else 1.0)
            assert torch.allclose(found[found != 0], expected[found != 0], atol=1e-6)
        energy_kept = report.experts[expert]["energy_kept"]
        assert 0.4 < energy_kept < 0.7 if compression == "random" else energy_kept > 0.7
        assert report.experts[expert]["rank_mean"] == 0.0


def test_shared_embeddings_have_no_exclusive_part(family: Get, tmp_path: Path) -> None:
    artifact, _ = written(family("bert").plan(exclusive={"rank": 2}), tmp_path)
    assert not any("embeddings.weight" in name for name in artifact.exclusive("sms"))


def test_difference_of_zero_is_not_stored(family: Get, tmp_path: Path) -> None:
    copy = Family(shutil.copytree(family("bert").root, tmp_path / "bert"))
    for folder, name in [("base", "pooler.dense.bias"), *((e, "bert.pooler.dense.bias") for e in EXPERTS)]:
        rewrite(copy.root / folder / "model.safetensors", lambda t, n=name: {**t, n: torch.ones(16)})
    artifact, _ = written(copy.plan(), tmp_path)
    assert "pooler.dense.bias" not in artifact.exclusive("sms")


# ---- other dtypes, several files


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_everything_is_stored_in_the_dtype_of_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    import transformers

    made = tiny.make_family(tmp_path / "family", tiny.bert().to(dtype), transformers.BertForSequenceClassification)
    plan = made.plan()
    artifact, _ = written(plan, tmp_path)
    assert {spec.dtype for spec in artifact.shared.specs.values()} == {dtype}
    for expert in EXPERTS:
        parts = artifact.exclusive(expert)
        assert {part.up.dtype if isinstance(part, LowRank) else part.dtype for part in parts.values()} == {dtype}
        for name, tensor in expert_state(plan, expert).items():
            difference = tensor.float() - artifact.shared.read(name).float()
            error = (dense(parts[name], tensor).float() - difference).norm() / difference.norm()
            assert error < 3 * torch.finfo(dtype).eps  # the difference is from the shared tensor as it is stored


def kept_of(plan: Plan, artifact: TwinArtifact, expert: str) -> float:
    """The share of the squared norm of what an expert's embeddings and all else changed that its parts leave."""
    parts, whole, left = artifact.exclusive(expert), 0.0, 0.0
    for name, tensor in expert_state(plan, expert).items():
        difference = (tensor - artifact.shared.read(name)).double()
        whole += float(difference.square().sum())
        found = dense(parts[name], tensor).double() if name in parts else 0.0
        left += float((difference - found).square().sum())
    return 1 - left / whole


def test_eight_bits_hold_factors_and_sixteen_the_vectors(family: Get, tmp_path: Path) -> None:
    plan = family("bert").plan(exclusive={"rank": 4, "dtype": "float8_e4m3fn"})
    exact, _ = written(family("bert").plan(exclusive={"rank": 4}), tmp_path / "exact")
    artifact, report = written(plan, tmp_path / "eight")
    for expert in EXPERTS:
        folder = artifact.path / "experts" / expert
        pairs = Checkpoint.open(folder / "adapter_model.safetensors").specs
        assert {spec.dtype for spec in pairs.values()} == {torch.float8_e4m3fn}
        assert {s.dtype for s in Checkpoint.open(folder / "exclusive.safetensors").specs.values()} == {torch.float16}
        parts, of_exact = artifact.exclusive(expert), exact.exclusive(expert)
        for name, part in parts.items():
            if isinstance(part, LowRank):
                assert part.up.dtype == plan.base.specs[name].dtype
                found, wanted = part.dense(), of_exact[name].dense()  # type: ignore[union-attr]
                assert (found - wanted).norm() < 0.05 * wanted.norm()  # entries keep 4 bits, see tensors/eight_bit.py
        assert report.experts[expert]["energy_kept"] == pytest.approx(kept_of(plan, artifact, expert), rel=1e-4)


def test_budget_counts_eight_bits(family: Get, tmp_path: Path) -> None:
    settings = {"budget": 2.0, "embeddings": "exclusive"}
    plan = family("bert").plan(exclusive={**settings, "dtype": "float8_e4m3fn"})
    artifact, _ = written(plan, tmp_path / "eight")
    wide, _ = written(family("bert").plan(exclusive={**settings, "dtype": None}), tmp_path / "wide")

    def ranks(of: TwinArtifact) -> int:
        return sum(part.rank for e in EXPERTS for part in of.exclusive(e).values() if isinstance(part, LowRank))

    assert artifact.bytes_per_part()["exclusive"] <= 2.0 * plan.base.nbytes
    assert ranks(artifact) > 2 * ranks(wide)


def test_large_models_are_written_in_several_files(
    family: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = family("bert").plan(exclusive={"rank": 1})
    whole, _ = written(plan, tmp_path / "whole")
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 4096)
    sharded, _ = written(plan, tmp_path / "sharded")
    assert len(list(sharded.path.glob("model-*.safetensors"))) > 3
    assert all(torch.equal(sharded.shared.read(name), whole.shared.read(name)) for name in plan.base.specs)
    assert sharded.bytes_per_part()["shared"] > whole.bytes_per_part()["shared"]


def test_side_files_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "onnx").mkdir()
    copied = ["config.json", "tokenizer.model", "vocab.txt", "chat_template.jinja", "generation_config.json"]
    left = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "twin.json", "README.md"]
    for name in copied + left:
        (source / name).write_text(name)
    copy_side_files(source, target)
    assert sorted(path.name for path in target.iterdir()) == sorted(copied)


# ---- one seed, one result


@pytest.mark.parametrize(
    "settings",
    [
        {"exclusive": {"rank": 2}},
        {"exclusive": {"budget": 2.0}, "shared": {"method": "ties"}},
        {"exclusive": {"compression": "random", "density": 0.3}, "shared": {"method": "dare_ties"}},
    ],
)
def test_order_of_experts_in_the_recipe_changes_no_byte(
    family: Get, tmp_path: Path, settings: dict[str, dict[str, Any]]
) -> None:
    root = family("bert").root
    hashes = []
    for order in (EXPERTS, EXPERTS[::-1], EXPERTS):
        folder = tmp_path / str(len(hashes))
        artifact, report = written(Family(root, order).plan(**settings), folder)
        files = [path for path in sorted(artifact.path.rglob("*")) if path.is_file() and path.name != "twin.json"]
        hashes.append(
            {path.relative_to(artifact.path): sha256_of(path) for path in files} | {Path("report"): str(report)}
        )
    assert hashes[0] == hashes[1] == hashes[2]


def test_seed_decides_what_random_sparsification_keeps(family: Get, tmp_path: Path) -> None:
    kept = []
    for seed in (0, 1):
        plan = family("bert").plan(exclusive={"compression": "random", "density": 0.3}, seed=seed)
        kept.append(written(plan, tmp_path / str(seed))[0].exclusive("sms")["pooler.dense.weight"].indices)
    assert kept[0].tolist() != kept[1].tolist()


def test_decomposing_a_tensor_twice_writes_the_same_bytes(family: Get, tmp_path: Path) -> None:
    plan = family("bert").plan()
    task = next(task for task in plan.tasks if task.kind == "linear")
    stats = prepare(plan)
    for name in ("a", "b"):
        decompose_tensor(task, plan, stats, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_progress_is_told_after_every_step(family: Get, tmp_path: Path) -> None:
    plan = family("bert").plan(exclusive={"rank": 1})
    told: list[tuple[str, int, int]] = []
    (tmp_path / "twin").mkdir()
    write_weights(plan, tmp_path / "twin", tmp_path, lambda *step: told.append(step))
    count = len(plan.tasks)
    expected = [("decomposing", i + 1, count) for i in range(count)] + [("writing experts", i + 1, 3) for i in range(3)]
    assert told == expected


# ---- heads


def test_heads_are_kept_whole_with_their_labels(family: Get, tmp_path: Path) -> None:
    found = family("distilbert")
    artifact, _ = written(found.plan(exclusive={"rank": 1}), tmp_path)
    for expert in EXPERTS:
        head = artifact.head(expert)
        assert head is not None
        config, tensors = head
        stored = Checkpoint.open(found.root / expert)
        assert config == json.loads((found.root / expert / "config.json").read_text())
        assert sorted(tensors) == [
            "classifier.bias",
            "classifier.weight",
            "pre_classifier.bias",
            "pre_classifier.weight",
        ]
        assert all(torch.equal(tensor, stored.read(name)) for name, tensor in tensors.items())


def test_experts_that_share_the_output_layer_have_no_head(family: Get, tmp_path: Path) -> None:
    artifact, _ = written(family("llama").plan(exclusive={"rank": 1}), tmp_path)
    assert artifact.head("sms") is None
