"""The recipe: strict, its defaults, where its paths lead, and one line for whatever is wrong with it."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from twinmerge.errors import InputError, RecipeError
from twinmerge.files.schema import load_yaml
from twinmerge.merging.average import Average
from twinmerge.merging.ties import Ties
from twinmerge.twin.features import Features, Layers
from twinmerge.twin.recipe import DEFAULT_BUDGET, ExclusiveSettings, ExpertSource, Recipe, RouterSettings

GOOD = """base: base
experts:
  trec: {model: trec, router_data: trec.jsonl}
  sms: {model: sms, router_data: sms.jsonl}
"""
SOURCES = {name: ExpertSource(model=name, router_data=f"{name}.jsonl") for name in ("trec", "sms")}


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ---- what a good recipe is


def test_shortest_recipe_takes_the_defaults(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, GOOD))
    assert recipe == Recipe(base="base", experts=SOURCES, root=tmp_path)
    assert recipe.shared == Average()
    assert (recipe.exclusive.budget, recipe.exclusive.dtype) == (DEFAULT_BUDGET, "int4")
    assert Recipe(base="base", experts=SOURCES, exclusive={"rank": 4}).exclusive.dtype is None
    assert (recipe.router.method, str(recipe.router.features), recipe.seed) == ("linear", "speculative", 0)


@pytest.mark.parametrize(
    ("given", "features", "gate"),
    [
        ({}, "speculative", "hard"),
        ({"gate": "soft"}, "all+tokens", "soft"),
        ({"gate": "groups"}, "all+tokens", "groups"),
        ({"features": "last"}, "last", "soft"),
        ({"features": "last", "gate": "hard"}, "last", "hard"),
    ],
)
def test_gate_and_features_follow_from_each_other(given: dict[str, str], features: str, gate: str) -> None:
    settings = RouterSettings.model_validate(given)
    assert (str(settings.features), settings.gate) == (features, gate)


def test_every_section_is_read(tmp_path: Path) -> None:
    recipe = Recipe.load(
        write(
            tmp_path,
            GOOD
            + "shared: {method: ties, density: 0.1}\nexclusive: {rank: 4, embeddings: exclusive}\n"
            + "router: {method: mlp, features: 'layers:[0, 2]', fallback: null}\nmax_length: 64\nseed: 7\n",
        )
    )
    assert recipe.shared == Ties(density=0.1)
    assert recipe.exclusive == ExclusiveSettings(rank=4, embeddings="exclusive")
    assert recipe.router == RouterSettings(method="mlp", features="layers:[0, 2]", fallback=None)
    assert (recipe.max_length, recipe.seed) == (64, 7)


def test_section_without_a_policy_takes_the_default_budget() -> None:
    assert ExclusiveSettings().budget == DEFAULT_BUDGET
    assert ExclusiveSettings(embeddings="exclusive").budget == DEFAULT_BUDGET
    assert ExclusiveSettings(rank=0).budget is None
    assert ExclusiveSettings(compression="random", density=0.5).budget is None


@pytest.mark.parametrize(
    ("words", "features"),
    [
        ("last", Features(Layers("last"))),
        ("all", Features(Layers("all"))),
        ("embeddings", Features(Layers((0,)))),
        ("layer:12", Features(Layers((12,)))),
        ("layers:[3,0,5]", Features(Layers((3, 0, 5)))),
        ("tokens", Features(None, tokens=True)),
        ("all+tokens", Features(Layers("all"), tokens=True)),
        ("layer:2+tokens", Features(Layers((2,)), tokens=True)),
        ("cascade", Features(Layers("all"), tokens=True, form="cascade")),
        ("speculative", Features(Layers("all"), tokens=True, form="speculative")),
    ],
)
def test_words_of_a_recipe_become_typed_features_and_words_again(words: str, features: Features) -> None:
    settings = RouterSettings(features=words, gate="hard")
    assert settings.features == features == RouterSettings(features=features, gate="hard").features
    assert settings.model_dump()["features"] == str(features) == words


def test_other_spellings_of_features_are_known() -> None:
    assert Features.parse("layers:[ 0, 3,5 ]") == Features(Layers((0, 3, 5)))
    assert Features.parse("layers:[1]") == Features.parse("layer:1")
    assert str(Features.parse("layer:0")) == "embeddings"


def test_recipe_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe(base="base", experts=SOURCES).seed = 3  # type: ignore[misc]


# ---- what is wrong, on which line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "shared:\n  method: ties\n  densty: 0.2\n",
            ":7: unknown key 'densty' under shared; did you mean 'density'?",
        ),
        ("rter: {}\n", ":5: unknown key 'rter'; did you mean 'router'?"),
        ("zzz: 1\n", ":5: unknown key 'zzz'; known keys: base, experts, shared, exclusive, router, max_length, seed"),
        ("exclusive: {rank: 4, embedings: shared}\n", ":5: unknown key 'embedings' under exclusive; did you mean"),
        ("exclusive: {rank: -1}\n", ":5: exclusive.rank: input should be greater than or equal to 0, found -1"),
        ("exclusive: {rank: 1.5}\n", ":5: exclusive.rank: input should be a valid integer, found 1.5"),
        ("exclusive: {rank: true}\n", ":5: exclusive.rank: input should be a valid integer, found True"),
        ("exclusive:\n  budget: 0\n", ":6: exclusive.budget: input should be greater than 0, found 0"),
        ("exclusive: {budget: .nan}\n", ":5: exclusive.budget: input should be a finite number, found nan"),
        ("exclusive: {energy: 2}\n", ":5: exclusive.energy: input should be less than or equal to 1, found 2"),
        (
            "exclusive: {rank: 1, energy: 0.5}\n",
            ":5: exclusive: compression svd takes one of rank, energy, budget, found rank and energy",
        ),
        ("exclusive: {density: 0.5}\n", ":5: exclusive: compression svd takes one of .*, found density"),
        (
            "exclusive: {compression: magnitude}\n",
            ":5: exclusive: compression magnitude takes density, found none",
        ),
        (
            "exclusive: {compression: random, density: 0.1, dtype: float8_e4m3fn}\n",
            ":5: exclusive: dtype float8_e4m3fn is for factors, compression svd, found random",
        ),
        (
            "exclusive: {energy: 0.9, weighting: inputs}\n",
            ":5: exclusive: weighting inputs is for factors that a rank or a budget chooses, found energy",
        ),
        (
            "exclusive: {compression: magnitude, density: 0.1, weighting: two_sided}\n",
            ":5: exclusive: weighting two_sided is for factors that a rank or a budget chooses, found magnitude",
        ),
        ("exclusive: {compression: random, rank: 3}\n", ":5: exclusive: compression random takes density, found rank"),
        ("exclusive: {embeddings: no}\n", ":5: exclusive.embeddings: input should be .* found False"),
        ("shared: {scaling: 0.3}\n", ":5: key 'shared.method' is missing"),
        ("shared: {method: tis}\n", ":5: shared.method must be pretrained or .* or [a-z_]+, found 'tis'"),
        ("shared: {method: ties, density: 2}\n", ":5: shared.density: input should be less than or equal to 1"),
        ("shared: {method: ties, scaling: fast}\n", r":5: shared.scaling: .* found 'fast' \(and 1 more\)"),
        ("shared: ties\n", ":5: shared: input should be a valid dictionary .* found 'ties'"),
        ("router: {features: layer}\n", ":5: router.features: must be last, all, .* found 'layer'"),
        ("router: {features: speculative, gate: soft}\n", ":5: router: .* gate must be hard, found soft"),
        ("router: {method: svm}\n", ":5: router.method: input should be 'linear', .* found 'svm'"),
        ("router: {fallback: 0.2}\n", ":5: router.fallback: input should be greater than 0.5, found 0.2"),
        ("router: 3\n", ":5: router: .* found 3"),
        ("seed: -1\n", ":5: seed: input should be greater than or equal to 0, found -1"),
        ("max_length: 0\n", ":5: max_length: .* found 0"),
        ("base: other\n", ":5: key 'base' stands twice, first on line 1; names must differ"),
        ("? [a, b]\n: 3\n", ":5: keys must be plain words"),
        ("1: 2\n", ":1: 1: keys should be strings, found 1"),
    ],
)
def test_wrong_section_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe.yaml{message}") as caught:
        Recipe.load(write(tmp_path, GOOD + text))
    assert "\n" not in str(caught.value)
    assert (isinstance(caught.value, InputError), caught.value.exit_code) == (True, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: must hold keys and values, found NoneType"),
        ("- a\n", ":1: must hold keys and values, found list"),
        ("base: x\n", ":1: key 'experts' is missing"),
        ("base: x\nexperts: {}\n", ":2: experts: a twin needs at least two experts, found 0"),
        ("base: x\nexperts:\n  a: {model: a, router_data: b}\n", ":2: experts: a twin needs at least two .* found 1"),
        (
            "base: x\nexperts:\n  a: {model: a, router_data: b}\n  a: {model: c, router_data: b}\n",
            ":4: key 'a' stands twice, first on line 3; names must differ",
        ),
        (
            "base: x\nexperts:\n  a: {model: a, router_data: b}\n  A: {model: c, router_data: b}\n",
            ":2: experts: experts' names must differ in more than case",
        ),
        (
            "base: x\nexperts:\n  a: {model: a, router_data: b}\n  b/c: {model: c, router_data: b}\n",
            ":2: experts: an expert's name is letters, .* found 'b/c'",
        ),
        (
            "base: x\nexperts:\n  a: {model: a, router_data: b}\n  shared: {model: c, router_data: b}\n",
            ":2: experts: an expert's name is .* not 'shared', found 'shared'",
        ),
        (
            "base: x\nexperts:\n  a: {model: a}\n  b: {model: c, router_data: b}\n",
            ":1: experts.a.router_data is missing: the router learns from inputs of every expert",
        ),
        (
            "base: x\nexperts:\n  a:\n    model: a\n    router_dta: x\n  b: {model: c, router_data: b}\n",
            ":5: unknown key 'router_dta' under experts.a; did you mean 'router_data'?",
        ),
        ("base: x\nexperts:\n  a: b\n  c: d\n", r":3: experts.a: .* found 'b' \(and 1 more\)"),
        ("base: x\nexperts: [a, b]\n", r":2: experts: input should be a valid dictionary, found \['a', 'b'\]"),
        ("base: [{a: 1, a: 2}]\n", ":1: key 'a' stands twice, first on line 1"),
        ("base: x\nexperts: &e\n  a: *e\n", ":1: an anchor holds itself"),
        ("a: b: c\n", ":1: not valid YAML: mapping values are not allowed here"),
        ("base: x\nexperts: [1, 2\n", ":3: not valid YAML: expected ',' or ']'"),
        ("base: \x00", ":1: not valid YAML: unacceptable character"),
    ],
)
def test_file_that_is_no_recipe_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe.yaml{message}") as caught:
        Recipe.load(write(tmp_path, text))
    assert "\n" not in str(caught.value)


class Lists(BaseModel):
    numbers: list[int]
    settings: list[RouterSettings] = []


def test_place_in_a_list_has_its_own_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml:3: numbers\.1: .* found 'x'"):
        load_yaml(write(tmp_path, "numbers:\n- 1\n- x\n"), Lists)
    with pytest.raises(RecipeError, match=r"recipe\.yaml:3: unknown key 'epoch' .*did you mean 'epochs'"):
        load_yaml(write(tmp_path, "numbers: []\nsettings:\n- epoch: 3\n"), Lists)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml cannot be read: .*No such file"):
        Recipe.load(tmp_path / "nowhere.yaml")


def test_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00x")
    with pytest.raises(RecipeError, match=r"recipe\.yaml cannot be read: 'utf-8' codec"):
        Recipe.load(path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["base", "experts", "shared", "method", "exclusive", "rank", "x"]), inner)
        ),
        max_leaves=12,
    )
)
def test_any_yaml_is_a_recipe_or_one_line(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    import yaml

    path = write(tmp_path_factory.mktemp("yaml"), yaml.safe_dump(data, allow_unicode=True))
    with pytest.raises(RecipeError, match=r"recipe\.yaml:\d+: ") as caught:
        load_yaml(path, Recipe)
    assert "\n" not in str(caught.value)


# ---- where paths lead


def test_paths_start_from_the_folder_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path, GOOD)
    monkeypatch.chdir(tmp_path.parent)
    recipe = Recipe.load(Path(tmp_path.name) / "recipe.yaml")
    assert recipe.locate("base", "base") == (tmp_path / "base").resolve()
    assert recipe.locate(str(tmp_path / "base"), "base") == (tmp_path / "base").resolve()


@pytest.mark.parametrize("source", ["bas", "./models/base", "models/base/v1", "here/base"])
def test_path_that_is_not_there_is_named_with_its_key(tmp_path: Path, source: str) -> None:
    (tmp_path / "here").mkdir()
    recipe = Recipe(base="base", experts=SOURCES, root=tmp_path)
    with pytest.raises(RecipeError, match=r"^experts\.sms\.model: no file or folder .*; paths start from"):
        recipe.locate(source, "experts.sms.model")


def test_hub_id_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda source, **_: str(tmp_path / source))
    found = Recipe(base="base", experts=SOURCES, root=tmp_path).locate("owner/model", "base")
    assert found == tmp_path / "owner/model"


def test_hub_id_that_cannot_be_fetched_is_one_line(tmp_path: Path) -> None:
    recipe = Recipe(base="base", experts=SOURCES, root=tmp_path)
    with pytest.raises(RecipeError, match=r"^base: .*hub id 'nobody/nothing' cannot be fetched: ") as caught:
        recipe.locate("nobody/nothing", "base")
    assert "\n" not in str(caught.value)


def test_rows_that_are_named_in_another_form_are_refused_by_their_key(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nx\n")
    experts = {name: {"model": name, "router_data": "a.csv#text="} for name in ("a", "b")}
    recipe = Recipe.model_validate({"base": "base", "experts": experts, "root": tmp_path})
    with pytest.raises(RecipeError, match=r"^experts\.a\.router_data: a.csv#text=: after # stands a column"):
        recipe.router_files  # noqa: B018
