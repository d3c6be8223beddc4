"""What a build takes, from names and shapes: bounds of what it really writes, and threads that the memory allows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_70b
from tests import tiny
from tests.tiny import Family, adapter_family
from twinmerge.errors import RecipeError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.hf.classes import LIBRARY
from twinmerge.jobs.build import kinds_of
from twinmerge.jobs.plan import describe, describe_twin
from twinmerge.merging.executor import OWN_BYTES, Processes, Serial, Threads
from twinmerge.merging.plan import plan_merge
from twinmerge.merging.recipe import load_merge, twin_keys
from twinmerge.twin.budget import Needs
from twinmerge.twin.decompose import write_weights
from twinmerge.twin.plan import make_plan
from twinmerge.twin.recipe import Recipe
from twinmerge.twin.shared import prepare

Get = Callable[[str], Family]
POLICIES: list[dict[str, Any]] = [
    {"rank": 2},
    {"rank": 64, "embeddings": "exclusive"},
    {"energy": 0.9},
    {"budget": 2.0},
    {"compression": "magnitude", "density": 0.3},
]


@pytest.mark.parametrize("exclusive", POLICIES)
def test_files_take_no_more_than_was_said(family: Get, tmp_path: Path, exclusive: dict[str, Any]) -> None:
    plan = family("bert").plan(exclusive=exclusive)
    needs = Needs.of(plan)
    for name in ("twin", "work"):
        (tmp_path / name).mkdir()
    write_weights(plan, tmp_path / "twin", tmp_path / "work", executor=Serial())
    written = [Checkpoint.open(path).nbytes for path in (tmp_path / "twin").rglob("*.safetensors")]
    assert sum(written) <= needs.result_bytes
    parts = [Checkpoint.open(path) for path in (tmp_path / "work").iterdir()]
    found = ("/spectrum", "/energy", "/kept")
    tensors = [spec for part in parts for n, spec in part.specs.items() if not n.endswith(found)]
    assert sum(spec.nbytes for spec in tensors) <= needs.parts_bytes + 8 * len(plan.tasks)


def test_as_many_threads_as_the_memory_allows_and_at_least_one(family: Get) -> None:
    needs = Needs.of(family("bert").plan())
    room = OWN_BYTES + 2 * needs.memory_bytes
    assert needs.within(Threads(8), room) == Threads(2)
    assert needs.within(Threads(1), room) == Threads(1)
    assert needs.within(Processes(8), room) == Processes(8)
    with pytest.raises(RecipeError, match="--memory must be at least .* MB for "):
        needs.within(Serial(), OWN_BYTES)


def test_plan_of_adapters_names_them(tmp_path: Path) -> None:
    plan = adapter_family(tmp_path)[0].plan(shared={"method": "task_arithmetic", "scaling": "auto"})
    found = describe_twin(plan, 10**9, Threads(1), tmp_path)
    assert all(expert["adapter"] for expert in found["experts"].values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("experts: {a: {model: a, router_data: a}}", True),
        ("experts: {a: a}", False),
        ("exclusive: {rank: 1}", True),
        ("- 1", False),
        ("a: b: c", False),
    ],
)
def test_a_twins_recipe_is_known_by_its_keys(tmp_path: Path, text: str, expected: bool) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert bool(twin_keys(tmp_path / "recipe.yaml")) == expected


def test_a_70b_checkpoint_of_sparse_files_is_planned_in_bounded_memory(tmp_path: Path) -> None:
    size = bench_70b.SIZES["70b"]
    for name in ("base", "a", "b"):
        bench_70b.write(tmp_path / name, size)
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*.safetensors")) < 10**8  # no room on the disk
    merge = describe(plan_merge(load_merge(bench_70b.merge_recipe(tmp_path))), 2 * 10**9, Threads(2), tmp_path)
    assert (merge["tensors"], merge["layers"], merge["parameters"]) == (723, 80, 70_553_706_496)
    recipe = Recipe.load(bench_70b.twin_recipe(tmp_path))
    for rows in tmp_path.glob("*.jsonl"):
        rows.write_text('{"text": "w5 w6"}\n{"text": "w7"}\n', encoding="utf-8")
    plan = make_plan(recipe, LIBRARY, kinds_of)
    twin = describe_twin(plan, 64 * 10**9, Threads(2), tmp_path)
    assert twin["read_bytes"] == 3 * 2 * 70_553_706_496
    assert twin["memory_needed_bytes"] < 20 * 10**9
    prepare(plan)  # zeros have no direction: nothing says that they are unrelated
