"""Systems that make a model for each task: against slow formulas, their laws, and what they store."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.merging.memory import merge, models
from twinmerge.files.checkpoint import TensorSpec
from twinmerge.merging.method import Chunk, Method
from twinmerge.merging.per_task import PerTask
from twinmerge.merging.statistics import Statistics

NAMES = ("emr", "tall", "tsv_c")


def method(name: str, **settings: Any) -> Any:
    found = Method.model_validate({"method": name, **settings})
    assert isinstance(found, PerTask)
    return found


def vectors(base: dict[str, Tensor], experts: dict[str, dict[str, Tensor]], tensor: str) -> list[Tensor]:
    return [experts[name][tensor].double() - base[tensor].double() for name in sorted(experts)]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_emr_is_the_elected_vector_under_the_tasks_mask_and_scale(index: int) -> None:
    base, experts = models()
    found = merge(method("emr", task=f"e{index}"), base, experts)
    expected = reference.emr([vectors(base, experts, tensor) for tensor in base], index)
    for tensor, change in zip(base, expected, strict=True):
        assert torch.allclose(found[tensor], base[tensor].double() + change, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.2, 0.4, 1.5])
def test_tall_keeps_what_a_tasks_mask_holds_of_the_sum(threshold: float) -> None:
    base, experts = models()
    found = merge(method("tall", task="e1", threshold=threshold), base, experts)
    for tensor in base:
        kept = reference.tall([v.float() for v in vectors(base, experts, tensor)], 1, threshold).double()
        assert torch.allclose(found[tensor], base[tensor] + kept, atol=1e-5)


def test_tsv_c_keeps_a_share_of_a_matrix_and_vectors_whole() -> None:
    base, experts = models()
    found = merge(method("tsv_c", task="e2"), base, experts)
    left, values, right = torch.linalg.svd(experts["e2"]["weight"].double() - base["weight"].double())
    cut = values[0] * torch.outer(left[:, 0], right[0])  # one of four, for three tasks
    assert torch.allclose(found["weight"], base["weight"] + cut, atol=1e-6)
    assert torch.allclose(found["bias"].float(), experts["e2"]["bias"], atol=1e-6)
    assert torch.allclose(found["conv"].float(), experts["e2"]["conv"], atol=1e-6)
    table = {name: {"embed_tokens.weight": state["weight"]} for name, state in experts.items()}
    mean = merge(method("tsv_c", task="e2"), {"embed_tokens.weight": base["weight"]}, table)["embed_tokens.weight"]
    assert torch.allclose(mean.float(), torch.stack([s["weight"] for s in experts.values()]).mean(0), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_one_expert_is_that_expert(name: str) -> None:
    base, experts = models(1)
    found = merge(method(name, task="e0"), base, experts)
    assert all(torch.allclose(found[tensor].float(), experts["e0"][tensor], atol=1e-5) for tensor in base)


def test_experts_that_are_alike_are_that_expert_by_emr() -> None:
    base, experts = models(1)
    alike = dict.fromkeys(["a", "b", "c"], experts["e0"])
    found = merge(method("emr", task="b"), base, alike)
    assert all(torch.allclose(found[tensor].float(), experts["e0"][tensor], atol=1e-5) for tensor in base)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_that_the_tasks_expert_lacks_is_the_bases(name: str) -> None:
    base, experts = models()
    chunk = Chunk("weight", 0, base["weight"], {n: experts[n]["weight"] for n in ("e0", "e1")})
    merged = method(name, task="e2").merge(chunk, Statistics(model={"e0": 1.0, "e1": 1.0}))
    assert torch.equal(merged, base["weight"].double())


@pytest.mark.parametrize("name", NAMES)
def test_task_must_be_an_expert(name: str) -> None:
    assert method(name, task="a").misfit(["a", "b"]) is None
    expected = "task must name the expert whose model is made, one of a, b; found "
    assert method(name).misfit(["b", "a"]) == f"{expected}none"
    assert method(name, task="c").misfit(["a", "b"]) == f"{expected}'c'"


def test_stored_bytes_are_those_of_the_papers() -> None:
    shapes = {"layer.weight": (6, 4), "layer.bias": (6,), "embed_tokens.weight": (10, 4)}
    specs = [TensorSpec(n, s, torch.float32, Path(), 4 * torch.Size(s).numel()) for n, s in shapes.items()]
    specs.append(TensorSpec("ids", (3,), torch.int64, Path(), 24))
    whole, bits = 4 * (24 + 6 + 40), -(-70 // 8)
    assert method("emr").stored_bytes(specs, 3) == {"shared": whole, "exclusive": whole + 3 * (bits + 4)}
    assert method("tall").stored_bytes(specs, 3) == {"shared": whole, "exclusive": whole + 3 * bits}
    assert method("tsv_c").stored_bytes(specs, 2) == {"shared": whole, "exclusive": 2 * 4 * (2 * (10 + 1) + 6)}
    assert method("tsv_c").memory_bytes((400, 300), 3) > 8 * 400 * 300
