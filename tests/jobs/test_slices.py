"""mergekit's slices: layers of several models one after the other, with a method of each slice."""

import json
from pathlib import Path

import pytest
import torch

from tests.jobs.test_merge import CONFIG, State, models, read, recipe, rewrite, tensors, write
from twinmerge.errors import MismatchError
from twinmerge.jobs.merge import MANIFEST, merge_models
from twinmerge.jobs.plan import describe
from twinmerge.merging.executor import make_executor
from twinmerge.merging.plan import plan_merge
from twinmerge.merging.recipe import load_merge

__all__ = ["models"]


def deep(folder: Path, name: str, seed: int, layers: int = 3) -> None:
    """A model of more layers, whose config says so."""
    state = tensors(seed)
    generator = torch.Generator().manual_seed(10 * seed + 1)
    for layer in range(layers):
        state[f"layers.{layer}.w"] = torch.randn(4, 6, generator=generator)
    types = [f"kind {layer}" for layer in range(layers)]
    write(folder / name, state, {**CONFIG, "num_hidden_layers": layers, "layer_types": types})


@pytest.fixture
def stacks(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        deep(tmp_path, name, seed)
    return tmp_path


def merged(folder: Path, text: str, out: str = "out") -> State:
    from twinmerge.models.compatible import Allow

    merge_models(recipe(folder, text), folder / out, allow=Allow(unrelated=True))
    return read(folder / out)


def test_passthrough_stacks_layers_of_two_models(stacks: Path) -> None:
    found = merged(
        stacks,
        """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 3]}]
dtype: float32
""",
    )
    a, b = read(stacks / "a"), read(stacks / "b")
    expected = [a["layers.0.w"], a["layers.1.w"], b["layers.1.w"], b["layers.2.w"]]
    assert [torch.equal(found[f"layers.{i}.w"], w) for i, w in enumerate(expected)] == [True] * 4
    assert torch.equal(found["embed.weight"], a["embed.weight"])
    assert torch.equal(found["norm.weight"], b["norm.weight"])
    config = json.loads((stacks / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    assert config["layer_types"] == ["kind 0", "kind 1", "kind 1", "kind 2"]
    manifest = json.loads((stacks / "out" / MANIFEST).read_text())
    assert [entry["source"] for entry in manifest["inputs"]] == ["a", "b"]


def test_passthrough_scales_by_slice_source_and_name(stacks: Path) -> None:
    found = merged(
        stacks,
        """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 1]}]
  - sources:
      - model: a
        layer_range: [0, 3]
        parameters: {scale: [{filter: layers, value: [0, 1]}, {value: 3}]}
  - sources: [{model: a, layer_range: [2, 3]}]
    parameters: {scale: 5}
parameters: {scale: 2}
""",
    )
    a = read(stacks / "a")
    scales = [(0, 2.0), (0, 0.0), (1, 0.5), (2, 1.0), (2, 5.0)]
    for layer, (source, scale) in enumerate(scales):
        assert torch.allclose(found[f"layers.{layer}.w"], scale * a[f"layers.{source}.w"])
    assert torch.allclose(found["embed.weight"], 2 * a["embed.weight"])
    assert torch.allclose(found["norm.weight"], 5 * a["norm.weight"])


def test_a_single_model_passes_through_as_it_is(models: Path) -> None:
    found = merged(models, "merge_method: passthrough\nmodels: [{model: a}]\n")
    assert all(torch.equal(tensor, read(models / "a")[name]) for name, tensor in found.items())


def test_slices_are_merged_each_with_its_own_settings(stacks: Path) -> None:
    found = merged(
        stacks,
        """
merge_method: task_arithmetic
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 1]}
      - {model: a, layer_range: [0, 1], parameters: {weight: 1.0}}
  - sources:
      - {model: base, layer_range: [1, 3]}
      - {model: b, layer_range: [1, 3], parameters: {weight: 0.5}}
""",
    )
    base, a, b = (read(stacks / name) for name in ("base", "a", "b"))
    assert torch.allclose(found["layers.0.w"], a["layers.0.w"], atol=1e-6)
    assert torch.allclose(found["layers.2.w"], 0.5 * base["layers.2.w"] + 0.5 * b["layers.2.w"], atol=1e-6)
    assert torch.allclose(found["embed.weight"], a["embed.weight"], atol=1e-6)


def test_a_layer_beyond_the_slices_has_no_method(stacks: Path) -> None:
    parts = "".join(f"  - sources: [{{model: a, layer_range: [{i}, {i + 1}]}}]\n" for i in range(2))
    methods = load_merge(recipe(stacks, f"merge_method: passthrough\nslices:\n{parts}")).methods
    assert methods.at("layers.1.w", 0.0).method == "average"
    with pytest.raises(ValueError, match="lies beyond the last slice"):
        methods.at("layers.2.w", 0.0)


def test_one_slice_may_leave_layers_out(stacks: Path) -> None:
    sources = ", ".join(f"{{model: {n}, layer_range: [1, 3], parameters: {{weight: 1}}}}" for n in ("a", "b"))
    found = merged(stacks, f"merge_method: linear\nslices: [{{sources: [{sources}]}}]\n")
    a, b = read(stacks / "a"), read(stacks / "b")
    assert torch.allclose(found["layers.0.w"], (a["layers.1.w"] + b["layers.1.w"]) / 2, atol=1e-6)
    assert "layers.2.w" not in found


def test_plan_counts_what_slices_read(stacks: Path) -> None:
    path = recipe(stacks, "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n")
    found = describe(plan_merge(load_merge(path)), 10**9, make_executor("serial"), stacks)
    assert found["layers"] == 1
    assert found["write_bytes"] < 400


def test_layers_in_two_stacks_are_refused(stacks: Path) -> None:
    rewrite(stacks / "a", lambda state: {**state, "decoder.0.w": torch.ones(2)})
    path = recipe(stacks, "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n")
    with pytest.raises(MismatchError, match="layers 0 to 1 are asked of a; its layers lie in 2 stacks"):
        merge_models(path, stacks / "out")
