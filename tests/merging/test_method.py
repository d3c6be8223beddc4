"""What all merge methods have in common: the registry, their settings, and the laws that each of them obeys."""

import math
import re
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.merging.memory import chunks, in_dtype, merge, models
from twinmerge.errors import CheckpointError, RecipeError
from twinmerge.files.schema import Strict, Variant, load_yaml
from twinmerge.merging import method as module
from twinmerge.merging.engine import merge_tensor
from twinmerge.merging.method import OWN, Chunk, Method, Scaled, find_method, merge_method, method_names
from twinmerge.merging.statistics import Statistics
from twinmerge.merging.ties import Ties

CALIBRATED = ("fisher", "regmean", "adamerging")
OURS = [name for name in OWN if name not in CALIBRATED]
SUMS = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock", "sce")
"""Add something up over a tensor, in float64, stretch by stretch."""
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def method(name: str, **settings: Any) -> Method:
    return Method.model_validate({"method": name, **settings})


def family(name: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """As many experts as the method takes."""
    return models({"slerp": 1, "nuslerp": 2}.get(name, 3))


# ---- laws of every method


@pytest.mark.parametrize("name", OURS)
def test_order_of_experts_changes_no_bit(name: str) -> None:
    base, experts = family(name)
    forward = merge(method(name), base, experts)
    backward = merge(method(name), base, dict(reversed(experts.items())))
    assert all(torch.equal(forward[tensor], backward[tensor]) for tensor in base)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("of_base", DTYPES)
@pytest.mark.parametrize("of_experts", DTYPES)
def test_inputs_keep_their_bits_and_the_result_is_wide(
    name: str, of_base: torch.dtype, of_experts: torch.dtype
) -> None:
    base, experts = family(name)
    base = in_dtype(base, of_base)
    experts = {expert: in_dtype(state, of_experts) for expert, state in experts.items()}
    given = {key: tensor.clone() for key, tensor in base.items()}
    theirs = {expert: {key: tensor.clone() for key, tensor in state.items()} for expert, state in experts.items()}
    chosen, [chunk, *_] = method(name), list(chunks(base, experts))
    statistics = Statistics(chosen.prepass(lambda: chunks(base, experts)))
    found = Statistics(statistics.model, chosen.measure(lambda: iter([chunk]), statistics))
    merged = chosen.merge(chunk, found)
    assert merged.dtype in (torch.float32, torch.float64)
    for memory in (chunk.base, *chunk.experts.values()):
        assert memory is not None
        assert merged.data_ptr() != memory.data_ptr()
    assert all(torch.equal(base[key], given[key]) for key in base)
    assert all(torch.equal(experts[e][key], theirs[e][key]) for e in experts for key in base)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("entries", [1, 5])
def test_stretches_change_no_bit(name: str, entries: int) -> None:
    base, experts = family(name)
    parts, once = merge(method(name), base, experts, entries=entries), merge(method(name), base, experts)
    equal = torch.allclose if name in SUMS else torch.equal
    assert all(equal(parts[tensor], once[tensor]) for tensor in base)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("average", {}),
        ("average", {"weight": 0.3}),
        ("task_arithmetic", {"scaling": 1.0}),
        ("ties", {"density": 1.0}),
        ("ties", {"density": 1.0, "scope": "tensor"}),
        ("dare_linear", {"density": 1.0, "scaling": 1.0}),
        ("dare_ties", {"density": 1.0}),
        ("slerp", {"t": 1.0}),
        ("multislerp", {}),
        ("karcher", {}),
        ("model_stock", {}),
        ("della", {"density": 1.0}),
        ("della_linear", {"density": 1.0, "scaling": 1.0}),
        ("breadcrumbs", {"density": 1.0, "gamma": 0.0, "scaling": 1.0}),
        ("breadcrumbs_ties", {"density": 1.0}),
        ("sce", {}),
        ("consensus", {"scaling": 1.0}),
        ("tsv_m", {}),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_expert_with_nothing_trimmed_is_that_expert(
    name: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    base, experts = models(1)
    base, expert = in_dtype(base, dtype), in_dtype(experts["e0"], dtype)
    merged = merge(method(name, **settings), base, {"e0": expert}, dtype=dtype)
    exact = dtype.itemsize == 2 or name in ("average", "slerp")  # task vectors may be rounded to float32
    for tensor in base:
        near = name == "tsv_m" and dtype.itemsize == 2  # the last bit, where a product lies between two of them
        assert torch.allclose(merged[tensor], expert[tensor], atol=0 if exact else 1e-6, rtol=8e-3 if near else 0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("average", {}),
        ("task_arithmetic", {"scaling": 1 / 3}),
        ("multislerp", {}),
        ("karcher", {}),
        ("model_stock", {}),
        ("ties", {"density": 1.0}),
        ("della", {"density": 1.0}),
        ("sce", {}),
        ("consensus", {"scaling": 1 / 3}),
    ],
)
def test_experts_that_are_alike_are_merged_to_that_expert(name: str, settings: dict[str, Any]) -> None:
    base, experts = models(1)
    merged = merge(method(name, **settings), base, dict.fromkeys(["a", "b", "c"], experts["e0"]))
    assert all(torch.allclose(merged[t].float(), experts["e0"][t], atol=1e-5) for t in base)


@pytest.mark.parametrize("name", OURS)
def test_a_merge_of_models_that_are_the_base_is_the_base(name: str) -> None:
    base, experts = family(name)
    merged = merge(method(name), base, dict.fromkeys(experts, base))
    assert all(torch.allclose(merged[tensor].float(), base[tensor], atol=1e-6) for tensor in base)


@pytest.mark.parametrize("name", [name for name in OURS if "scaling" in find_method(name).model_fields])
def test_scaling_zero_is_the_base_to_the_bit(name: str) -> None:
    base, experts = family(name)
    merged = merge(method(name, scaling=0.0), base, experts, dtype=torch.float32)
    assert all(torch.equal(merged[tensor], base[tensor]) for tensor in base)


@pytest.mark.parametrize("name", [name for name in OURS if name != "slerp"])
def test_experts_given_by_their_task_vectors_are_merged_alike(name: str) -> None:
    base, experts = family(name)
    base = {key: torch.zeros_like(tensor) for key, tensor in base.items()}
    chosen, [chunk, *_] = method(name), list(chunks(base, experts))
    statistics = Statistics(chosen.prepass(lambda: chunks(base, experts)))
    statistics = Statistics(statistics.model, chosen.measure(lambda: iter([chunk]), statistics))
    by_value = chosen.merge(chunk, statistics)
    assert torch.equal(chosen.merge(Chunk(chunk.tensor, 0, chunk.base, {}, chunk.experts), statistics), by_value)


def test_a_task_vector_needs_the_base() -> None:
    with pytest.raises(ValueError, match="'w': this method needs the base"):
        method("task_arithmetic").merge(Chunk("w", 0, None, {"a": torch.ones(2)}), Statistics())


# ---- the registry


def test_every_method_is_found_by_its_name_and_cites_a_paper() -> None:
    for name in OURS:
        assert find_method(name)().method == name
        assert find_method(name).paper.startswith(("arXiv:", "doi:", "https://"))
        assert set(find_method(name).model_fields) >= {"method"}


def test_a_name_belongs_to_one_method() -> None:
    class Other(Method):
        """Another's."""

    class Another(Method):
        """Yet another's."""

    with pytest.raises(RecipeError, match=r"merge method 'ties' is defined twice, in twinmerge.merging.ties and tests"):
        merge_method("ties", paper="arXiv:0000.00000")(Other)
    merge_method("of_a_test", paper="arXiv:0000.00000")(Other)
    with pytest.raises(RecipeError, match=r"'of_a_test' is defined twice, in tests.*Other and tests.*Another"):
        merge_method("of_a_test", paper="arXiv:0000.00000")(Another)
    del module._registered["of_a_test"]
    with pytest.raises(RecipeError, match="merge method 'magic' is not known; known are pretrained, average"):
        find_method("magic")


PACKAGE = """
from twinmerge.merging.method import Method, merge_method
@merge_method("from_elsewhere", paper="arXiv:0000.00000")
class Elsewhere(Method):
    uses_base = False
    def merge(self, chunk, statistics):
        return chunk.value(chunk.names[0])
"""


def test_methods_of_other_packages_are_found_and_imported_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere_methods.py").write_text(PACKAGE)
    values = {"from_elsewhere": "elsewhere_methods", "gone": "no_such_package", "empty": "twinmerge.errors:RankError"}
    entries = {name: EntryPoint(name, value, module.ENTRY_POINTS) for name, value in values.items()}
    monkeypatch.setattr(module, "_elsewhere", lambda: entries)
    monkeypatch.setattr(module, "_registered", dict(module._registered))
    monkeypatch.syspath_prepend(tmp_path)
    assert method_names()[-3:] == ("from_elsewhere", "gone", "empty")
    assert method("from_elsewhere").method == "from_elsewhere"
    with pytest.raises(RecipeError, match="merge method 'gone' of no_such_package cannot be imported: No module"):
        find_method("gone")
    with pytest.raises(RecipeError, match="RankError is to bring merge method 'empty' and registers none"):
        find_method("empty")


def test_installed_packages_are_asked_for_methods() -> None:
    assert module._elsewhere() == {}


# ---- settings


@pytest.mark.parametrize("name", OURS)
def test_settings_are_chosen_by_the_method_and_survive_json(name: str) -> None:
    chosen = method(name)
    assert chosen == find_method(name)()
    assert Method.model_validate(chosen.model_dump(mode="json")) == chosen
    assert Method.model_validate(chosen) is chosen
    assert next(iter(chosen.model_dump())) == "method"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "magic"}, "does not match any of the expected tags"),
        ({"method": ["ties"]}, "does not match any of the expected tags"),
        ({"density": 1}, "Unable to extract tag"),
        ("ties", "valid dictionary"),
        ({"method": "ties", "densty": 0.2}, "Extra inputs are not permitted"),
        ({"method": "ties", "density": 0}, "greater than 0"),
        ({"method": "ties", "density": 20}, "less than or equal to 1"),
        ({"method": "ties", "density": {"a": 20}}, "density.a\n.*less than or equal to 1"),
        ({"method": "ties", "density": math.nan}, "density"),
        ({"method": "ties", "density": "0.2"}, "valid number"),
        ({"method": "ties", "weight": True}, "valid number"),
        ({"method": "ties", "weight": math.inf}, "finite number"),
        ({"method": "ties", "scope": "layer"}, "'model' or 'tensor'"),
        ({"method": "task_arithmetic", "scaling": math.inf}, "finite number"),
        ({"method": "task_arithmetic", "scaling": "best"}, "'auto'"),
        ({"method": "task_arithmetic", "scaling": True}, "valid number"),
        ({"method": "dare_linear", "seed": -1}, "greater than or equal to 0"),
        ({"method": "dare_ties", "seed": 1.5}, "valid integer"),
        ({"method": "average", "scaling": 1}, "Extra inputs are not permitted"),
        ({"method": "slerp", "t": 2}, "less than or equal to 1"),
    ],
)
def test_wrong_settings_are_refused(given: object, words: str) -> None:
    with pytest.raises(ValidationError, match=words) as caught:
        Method.model_validate(given)
    assert caught.value.error_count() <= 2


def test_whole_numbers_are_taken_for_floats_and_nothing_can_be_changed() -> None:
    assert method("ties", density=1, scaling=2) == method("ties", density=1.0, scaling=2.0)
    with pytest.raises(ValidationError, match="frozen"):
        method("ties").density = 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        (
            "ties",
            {"density": {"a": 0.1}},
            r"density must be one number, or one for every expert \(a, b\); 'b' has none",
        ),
        ("ties", {"density": {"a": 0.1, "b": 0.2, "c": 0.3}}, "'c' is no expert"),
        (
            "average",
            {"weight": {"a": 1.0, "b": -1.0}},
            "must not sum to zero when they are normalised, found a 1, b -1",
        ),
        ("average", {"weight": {"b": 1.0}}, "weight must be one number"),
        ("task_arithmetic", {"weight": {"a": 1.0, "b": -1.0}}, None),
        ("pretrained", {}, None),
    ],
)
def test_settings_that_do_not_fit_the_experts_are_named(name: str, settings: dict[str, Any], words: str | None) -> None:
    fault = method(name, **settings).misfit(["b", "a"])
    assert (fault is None) == (words is None)
    assert re.search(words or "", fault or "")


class Holder(Strict):
    shared: Method
    trimmed: Ties = Ties()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("shared:\n  method: ties\n  densty: 1\n", ":3: unknown key 'densty' under shared; did you mean 'density'"),
        (
            "shared: {method: ties, density: {a: 2}}\n",
            ":1: shared.density.a: input should be less than or equal to 1, f",
        ),
        (
            "shared: {method: ties, density: 2}\n",
            ":1: shared.density: input should be less than or equal to 1, found 2$",
        ),
        ("shared: {method: magic}\n", ":1: shared.method must be pretrained or average or .*, found 'magic'$"),
        ("shared: {}\n", ":1: key 'shared.method' is missing$"),
        (
            "trimmed: {densty: 1}\nshared: {method: ties}\n",
            ":1: unknown key 'densty' under trimmed; did you mean 'dens",
        ),
        ("shared: 3\n", ":1: shared: input should be a valid dictionary .* found 3$"),
    ],
)
def test_a_wrong_setting_in_a_file_is_one_line_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=words):
        load_yaml(tmp_path / "recipe.yaml", Holder)


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_auto_scaling_must_be_replaced_before_merging(name: str) -> None:
    automatic = method(name, scaling="auto", **({} if name == "task_arithmetic" else {"density": 1.0}))
    base, experts = models()
    assert automatic.automatic
    assert not method(name).automatic
    assert isinstance(automatic, Scaled)
    with pytest.raises(ValueError, match=f"{name}: scaling 'auto' must be replaced by a number"):
        merge(automatic, base, experts)
    merged = merge(automatic.at(0.0), base, experts, dtype=torch.float32)
    assert all(torch.equal(merged[tensor], base[tensor]) for tensor in base)


def test_a_form_is_found_by_the_registry_of_its_class() -> None:
    assert Method.form_of({"method": "ties"}) is Ties.form_of({}) is Ties
    assert method("ties").coefficients(["a"]) is None
    with pytest.raises(NotImplementedError):
        Variant.form_of({})


# ---- the engine


class Whole(Method):
    """Gives so many entries of the first expert, and writes down what it was given."""

    whole = True
    given: list[tuple[int, ...]] = []
    entries: int = 24

    def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
        self.given.append(tuple(chunk.value("e0").shape))
        return chunk.value("e0").flatten()[: self.entries]


def test_a_method_that_looks_at_tensors_as_a_whole_gets_them_in_their_shape() -> None:
    base, experts = models()
    chosen = Whole()
    merged = merge(chosen, base, experts, entries=3)
    assert chosen.given == [(5,), (2, 3, 2, 2), (4, 6)]
    assert all(torch.equal(merged[name], experts["e0"][name].double()) for name in base)
    with pytest.raises(RecipeError, match=r"'weight': merge method '' must give the 24 entries that it got, found \[7"):
        merge(Whole(entries=7), {"weight": base["weight"]}, experts)


def test_a_class_without_a_merge_is_no_method() -> None:
    class Nothing(Method):
        """Forgot it."""

    with pytest.raises(NotImplementedError, match="Nothing has no merge"):
        merge(Nothing(), *models())


@pytest.mark.parametrize(
    ("tensor", "value", "dtype", "words"),
    [
        (
            "w",
            1e6,
            torch.float16,
            r"'w': the merged values go up to 1e\+06, more than torch.float16 holds; choose another",
        ),
        ("w", math.nan, torch.float32, "'w': the merged values go up to nan"),
        ("w", 500.0, torch.float8_e4m3fn, "'w': the merged values go up to 500, more than torch.float8_e4m3fn holds"),
        (
            "bn.running_var",
            -0.5,
            torch.float32,
            "'bn.running_var': the merged variances go down to -0.5, and a variance",
        ),
    ],
)
def test_a_merged_value_that_the_tensor_cannot_have_is_refused(
    tensor: str, value: float, dtype: torch.dtype, words: str
) -> None:
    def read(whole: bool) -> Iterator[Chunk]:
        yield Chunk(tensor, 0, None, {"a": torch.tensor([1.0, value])})

    with pytest.raises(CheckpointError, match=words):
        list(merge_tensor(method("average"), read, Statistics(), dtype, whole=False))
