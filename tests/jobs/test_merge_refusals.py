"""What cannot be merged is refused in one line, exit 2, and nothing is written."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.jobs.test_merge import CONFIG, State, change, kit, ours, read, recipe, rewrite, tensors
from tests.jobs.test_merge import models as models
from twinmerge.cli import main
from twinmerge.errors import CheckpointError, InputError, MismatchError, RecipeError
from twinmerge.jobs.merge import merge_models
from twinmerge.models.compatible import Allow

# ---- refusals: one line, exit 2, nothing written


def with_value(value: float) -> Callable[[State], object]:
    return lambda state: state["layers.1.w"].view(-1).__setitem__(7, value)


def stale(folder: Path) -> None:
    (folder / "a" / "model.safetensors").write_bytes((folder / "b" / "model.safetensors").read_bytes())


def truncate(folder: Path) -> None:
    file = folder / "b" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "nan": (lambda f: change(f / "a", with_value(float("nan"))), r"expert 'a': 'layers.1.w' in .*model.* has 1 NaN"),
    "inf": (lambda f: change(f / "a", with_value(float("inf"))), r"expert 'a': 'layers.1.w' .* has 1 NaN or Inf"),
    "flipped exponent": (
        lambda f: change(f / "a", lambda s: s["norm.weight"].__setitem__(1, 1e30)),
        "'norm.weight' in .* holds 1e.30, more than .* --allow-unrelated",
    ),
    "unrelated": (
        lambda f: change(
            f / "a", lambda s: s.update({n: torch.randn(t.shape) for n, t in tensors().items() if n != "ids"})
        ),
        "expert 'a' is no fine-tune of this base: .* found .*--allow-unrelated",
    ),
    "missing": (
        lambda f: change(f / "a", lambda s: s.pop("norm.weight")),
        "'a' lacks 1 of 4 tensors, first 'norm.weight'",
    ),
    "extra": (
        lambda f: change(f / "a", lambda s: s.update(head=torch.ones(2))),
        "'a' has 1 tensors that .* first 'head'",
    ),
    "shape": (
        lambda f: change(f / "a", lambda s: s.update({"embed.weight": torch.ones(8, 4)})),
        r"'embed.weight' has shape \[8, 4\], .* has \[9, 4\]",
    ),
    "kind": (
        lambda f: change(f / "a", lambda s: s.update({"norm.weight": torch.ones(4, dtype=torch.int32)})),
        r"a is quantised \('norm.weight' in model.safetensors\)",
    ),
    "integers": (lambda f: change(f / "a", lambda s: s.update(ids=torch.zeros(3).long())), "the integers of 'ids' in"),
    "rope": (
        lambda f: change(f / "a", len, {**CONFIG, "rope_theta": 5e5}),
        "rope_theta is 10000.0 in base and 500000.0 in a; --allow-config",
    ),
    "truncated": (truncate, "b/model.safetensors is truncated: tensor "),
    "stale index": (stale, "a holds both model.safetensors and model.safetensors.index.json; one of them is stale"),
    "adapter": (lambda f: (f / "a" / "adapter_config.json").touch(), "a is a LoRA adapter"),
    "vocabulary": (
        lambda f: [
            (f / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": place, "y": 1 - place}}}))
            for place, name in enumerate(("base", "a"))
        ],
        "'a' has another vocabulary: token 'x' is 0 in .* and 1 in",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_models_that_cannot_be_right_are_refused_in_one_line(
    models: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, words = WRONG[case]
    spoil(models)
    before = sorted(models.rglob("*"))
    path = ours(models)
    assert main(["merge", str(path), "--out", str(models / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("twinmerge")]
    assert len(lines) == 1
    with pytest.raises(InputError, match=words):
        raise InputError(lines[0])
    assert sorted(models.rglob("*")) == sorted([*before, path])


KIT_WRONG = {
    "weight: 0.5, densty: 0.2": "recipe.yaml:5: unknown key 'densty' under models.0.parameters; did you mean 'density'",
    "weight: 0.5, density: 20": r"recipe.yaml:5: .*density: must be the fraction kept, in \(0, 1\], found 20",
    "weight: 0.5, density: -0.5": r"in \(0, 1\], found -0.5",
    "weight: [0.5, .nan]": "must be a finite number, found nan",
    "weight: []": "an empty list has no value",
    "weight: [{filtr: x, value: 1}]": "an entry of the list takes filter and value",
    "weight: [{filter: mlp, value: 1}]": "must give 'weight' for tensor 'embed.weight', found none",
    "density: 0.5": "must give 'weight' for tensor",
}


@pytest.mark.parametrize("parameters", KIT_WRONG)
def test_wrong_mergekit_parameters_are_named_with_their_line(models: Path, parameters: str) -> None:
    with pytest.raises(RecipeError, match=KIT_WRONG[parameters]):
        merge_models(kit(models, "ties", parameters), models / "out")


KIT_UNSUPPORTED = {
    "parameters: {rescale: true}": "parameters.rescale: input should be False, found True",
    "embed_slerp: true": "mergekit's key 'embed_slerp' is not supported",
    "typo: 1": "recipe.yaml:8: unknown key 'typo'; did you mean 'dtype'",
    "slices: []": "a recipe has either models or slices",
    "parameters: {normalise: true}": "unknown key 'normalise' under parameters; did you mean 'normalize'",
}


@pytest.mark.parametrize("more", KIT_UNSUPPORTED)
def test_mergekit_keys_that_are_not_supported_are_named(models: Path, more: str) -> None:
    with pytest.raises(RecipeError, match=KIT_UNSUPPORTED[more]):
        merge_models(kit(models, "ties", more=more + "\n"), models / "out")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("merge_method: linear\nname: x\n---\nmerge_method: linear\n", "holds 2 documents, and this takes one"),
        ("merge_method: nearswap\n", "merge_method 'nearswap' is not supported; known are linear"),
        ("merge_method: passthrough\n", "a recipe has either models or slices"),
        ("merge_method: passthrough\nmodels: [{model: a}, {model: b}]\n", "passthrough takes one model, found 2"),
        ("merge_method: ties\nmodels: [{model: a, parameters: {weight: 1}}]\n", "ties needs a base_model"),
        ("merge_method: karcher\nbase_model: base\nmodels: [{model: a}]\n", "counts the base_model of karcher as one"),
        ("merge_method: linear\nmodels: []\n", "none is left to merge"),
        ("merge_method: linear\nmodels: [{model: a}, {model: a}]\n", "'a' stands twice"),
        ("merge_method: linear\nmodels: [{model: a+lora}]\n", "models.0.model: no file or folder .*a.lora"),
        (
            "merge_method: slerp\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}\n",
            "found 2 others",
        ),
        ("merge_method: linear\nslices: [{sources: 1}]\n", "slices.0.sources: input should be a valid list"),
        ("merge_method: linear\nslices: [{sources: [{model: a}]}]\n", "'slices.0.sources.0.layer_range' is missing"),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [1, 1]}]}]\n",
            r"slices.0.sources.0.layer_range must be \[FIRST, END\] with as many layers .*, found \[1, 1\]",
        ),
        (
            "merge_method: ties\nbase_model: base\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n",
            "slices.0.sources must list the base_model once, found it 0 times",
        ),
        (
            "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1]}, "
            "{model: b, layer_range: [0, 1]}]}, {sources: [{model: a, layer_range: [1, 2]}]}]\n",
            "slices.1.sources must be as many as those of the first slice, 2, found 1",
        ),
        ("base: base\nexperts: {a: a}\nshared: {method: ties, scaling: auto}\n", "a static merge needs a number"),
        ("base: base\nexperts: {}\n", "experts"),
        ("- 1\n", "must hold keys and values"),
        ("merge_method: linear\nmodels: 3: 4\n", "not valid YAML"),
    ],
)
def test_recipes_that_make_no_merge_are_refused(models: Path, text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        merge_models(recipe(models, text), models / "out")


def test_a_slice_must_have_its_layers(models: Path) -> None:
    sources = "[{model: a, layer_range: [1, 3]}]"
    path = recipe(models, f"merge_method: passthrough\nslices: [{{sources: {sources}}}]\n")
    with pytest.raises(MismatchError, match="layers 1 to 3 are asked of a; it has 2"):
        merge_models(path, models / "out")


def test_weights_that_cancel_are_refused(models: Path) -> None:
    entries = f"[{{model: {models}/a, parameters: {{weight: 1}}}}, {{model: {models}/b, parameters: {{weight: -1}}}}]"
    with pytest.raises(RecipeError, match="must not sum to zero"):
        merge_models(recipe(models, f"merge_method: linear\nmodels: {entries}\n"), models / "out")
    assert not (models / "out").exists()


def test_a_result_too_large_for_its_dtype_is_refused(models: Path) -> None:
    path = kit(models, "task_arithmetic", "weight: 1.0e+6", "dtype: float16\n")
    with pytest.raises(CheckpointError, match="the merged values go up to .*, more than torch.float16 holds"):
        merge_models(path, models / "out")


def test_counters_of_training_steps_may_differ_and_are_the_bases(models: Path) -> None:
    for count, name in enumerate(("base", "a", "b")):
        rewrite(models / name, lambda state, count=count: state | {"bn.num_batches_tracked": torch.tensor(7 + count)})
    merge_models(ours(models), models / "out")
    assert read(models / "out")["bn.num_batches_tracked"].item() == 7


@pytest.mark.parametrize("method", ["task_arithmetic, scaling: 1.0", "average"])
def test_a_merged_variance_below_zero_is_refused_and_one_above_is_merged(models: Path, method: str) -> None:
    for name, variance in (("base", 1.0), ("a", 0.25), ("b", 0.25)):
        rewrite(models / name, lambda state, v=variance: state | {"bn.running_var": torch.tensor([2.0, v])})
    path = ours(models, f"{{method: {method}}}")
    if method == "average":
        merge_models(path, models / "out")
        assert read(models / "out")["bn.running_var"].tolist() == [2.0, 0.25]
        return
    with pytest.raises(CheckpointError, match="'bn.running_var': the merged variances go down to -0.5, and a varian"):
        merge_models(path, models / "out")
    assert not (models / "out").exists()


@pytest.mark.parametrize("shared", ["average", "task_arithmetic, scaling: 1.0", "ties", "dare_linear", "dare_ties"])
def test_a_merge_of_float64_models_is_that_of_float32_models_with_the_same_values(models: Path, shared: str) -> None:
    narrow = merge_models(ours(models, f"{{method: {shared}}}"), models / "narrow") and read(models / "narrow")
    for name in ("base", "a", "b"):
        rewrite(models / name, lambda s: {n: t.double() if t.dtype.is_floating_point else t for n, t in s.items()})
    merge_models(ours(models, f"{{method: {shared}}}", "dtype: float32\n"), models / "wide")
    assert all(torch.allclose(tensor, narrow[name], atol=1e-6) for name, tensor in read(models / "wide").items())


def test_a_twins_recipe_is_refused_at_once_with_the_command_that_takes_it(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "base: base\nexperts: {a: {model: a, router_data: x}, b: {model: b, router_data: x}}\nexclusive: {rank: 1}\n"
    assert main(["merge", str(recipe(models, text)), "--out", str(models / "out")]) == 2
    words = "recipe.yaml is the recipe of a twin (it has exclusive); `twinmerge build` takes it"
    assert words in capsys.readouterr().err


def test_allowed_differences_are_noted(models: Path) -> None:
    for case in ("unrelated", "vocabulary"):
        WRONG[case][0](models)
    (models / "a" / "config.json").write_text(json.dumps({**CONFIG, "rope_theta": 1.0}))
    notes = merge_models(ours(models), models / "out", allow=Allow(True, True, True))["notes"]
    assert [("rope_theta" in note, "vocabulary" in note) for note in notes] == [(True, False), (False, True)]
