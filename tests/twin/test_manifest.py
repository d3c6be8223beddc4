"""twin.json: what is written is read back, what is damaged is named by key, and older twins answer as they did."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.twin.test_artifact import manifest_of
from twinmerge.errors import ArtifactError
from twinmerge.jobs.predict import predict_file
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.twin.manifest import MANIFEST, read_manifest, record_recipe, record_root, write_manifest
from twinmerge.twin.recipe import Recipe

GOLDEN = Path(__file__).parent / "golden"
SHA = "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """Of a manifest beside one file."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_text("text")
    write_manifest(tmp_path, manifest_of(["ag", "sms"]))
    return json.loads((tmp_path / MANIFEST).read_text())


def rewritten(folder: Path, content: object) -> Path:
    (folder / MANIFEST).write_text(json.dumps(content))
    return folder


# ---- older twins


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twins that the version before typed manifests built and asked (commit 7795a30; tiny BERTs, random weights)."""
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(GOLDEN / "twins_v1.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", ["factors", "entries"])
def test_a_twin_of_the_version_before_loads_and_answers_as_it_did(golden: Path, tmp_path: Path, name: str) -> None:
    artifact = TwinArtifact.open(golden / name)
    assert artifact.verify() == len(artifact.manifest.files)
    assert artifact.manifest.inputs["ag"].licence == "mit"
    predict_file(golden / name, GOLDEN / "rows.jsonl", tmp_path / "answers")
    files = (golden / f"{name}.answers.jsonl", tmp_path / "answers")
    for before, now in zip(*([json.loads(line) for line in f.read_text().splitlines()] for f in files), strict=True):
        for key in ("expert", "label", "fallback", "text"):
            assert now[key] == before[key]
        assert now["gate"] == pytest.approx(before["gate"], abs=1e-4)
        assert now["score"] == pytest.approx(before["score"], abs=1e-4)


# ---- what is written


def test_golden_bytes_of_a_manifest(tmp_path: Path, content: dict[str, Any]) -> None:
    """Other bytes here are another format: count up FORMAT_VERSION."""
    assert list(content) == [
        "format_version", "created", "recipe", "versions", "base", "experts", "tensors", "router", "files",
    ]  # fmt: skip
    assert content["format_version"] == 1
    assert content["files"] == {"a/b.txt": {"bytes": 4, "sha256": SHA}}
    assert content["tensors"]["layer.norm.weight"] == {"kind": "vector", "ranks": {"ag": 2, "sms": 2}}
    raw = (tmp_path / MANIFEST).read_text()
    assert raw == json.dumps(content, indent=1) + "\n"


def test_what_is_written_is_read_back_with_what_a_later_version_added(tmp_path: Path, content: dict[str, Any]) -> None:
    content["check"] = {"rows": 3}
    content["recipe"]["exclusive"]["sharing"] = 0.5
    content["experts"]["sms"]["heads"] = ["a"]
    content["files"]["a/b.txt"]["mode"] = 7
    manifest = read_manifest(rewritten(tmp_path, content))
    assert manifest.experts["sms"].energy_kept == 0.5
    write_manifest(tmp_path, manifest, dict(manifest.files))
    assert json.loads((tmp_path / MANIFEST).read_text()) == content


def test_a_method_that_is_not_installed_here_is_no_obstacle(tmp_path: Path, content: dict[str, Any]) -> None:
    content["recipe"]["shared"] = {"method": "somebody's", "strength": [1, 2]}
    assert read_manifest(rewritten(tmp_path, content)).recipe.shared["method"] == "somebody's"


def test_what_the_first_twins_did_not_say_may_be_missing(tmp_path: Path, content: dict[str, Any]) -> None:
    for key in ("root", "notes", "changes"):
        content.pop(key, None)
    for entry in (content["base"], *content["experts"].values()):
        entry.pop("files", None)
        entry.pop("licence", None)
    manifest = read_manifest(rewritten(tmp_path, content))
    assert (manifest.root, manifest.notes, manifest.changes, manifest.base.files) == (None, [], [], {})


# ---- damage: one line that names the key and the file


Change = Callable[[dict[str, Any]], object]
DAMAGE: dict[str, tuple[Change, str]] = {
    "a key that is gone": (lambda m: m.pop("recipe"), "key 'recipe' is missing"),
    "one that lies deeper": (
        lambda m: m["experts"]["sms"].pop("energy_kept"),
        "key 'experts.sms.energy_kept' is missing",
    ),
    "a file's hash that is gone": (
        lambda m: m["files"]["a/b.txt"].pop("sha256"),
        r"key 'files.a/b.txt.sha256' is missing",
    ),
    "another type": (lambda m: m.update(files=None), "'files' must be a valid (dictionary|mapping), found None"),
    "a list for names": (
        lambda m: m.update(experts=[1]),
        r"'experts' must be a valid (dictionary|mapping), found \[1\]",
    ),
    "a text for a number": (
        lambda m: m["files"]["a/b.txt"].update(bytes="4"),
        "'files.a/b.txt.bytes' must be a valid integer, found '4'",
    ),
    "a negative size": (
        lambda m: m["base"].update(bytes=-1),
        "'base.bytes' must be greater than or equal to 0, found -1",
    ),
    "no hash": (lambda m: m["files"]["a/b.txt"].update(sha256="x" * 64), "'files.a/b.txt.sha256' must match pattern"),
    "an unknown kind": (
        lambda m: m["tensors"]["layer.values"].update(kind="vectr"),
        "'tensors.layer.values.kind' must be 'linear', .*, found 'vectr'",
    ),
    "a rank that is none": (
        lambda m: m["tensors"]["layer.values"]["ranks"].update(sms=1.5),
        "'tensors.layer.values.ranks.sms' must be a valid integer, found 1.5",
    ),
    "experts that are not the recipe's": (
        lambda m: m["experts"].pop("sms"),
        r"experts must be those of recipe\.experts in alphabetical order, found ag",
    ),
    "experts in another order": (
        lambda m: m.update(experts=dict(reversed(m["experts"].items()))),
        "experts must be those of .* in alphabetical order, found sms, ag",
    ),
    "a rank of a stranger": (
        lambda m: m["tensors"]["layer.values"]["ranks"].update(news=1),
        "tensors or vocabulary name expert 'news', which experts does not",
    ),
    "a name that is a path": (
        lambda m: m["recipe"]["experts"].update({"../x": {"model": "x", "router_data": "x"}}),
        r"'recipe\.experts\.\.\./x' must match pattern .*, found '\.\./x'",
    ),
    "a file that lies elsewhere": (
        lambda m: m["files"].update({"../x": m["files"]["a/b.txt"]}),
        r"files\.\.\./x: a file must lie in the twin's folder",
    ),
    "a file of the system": (
        lambda m: m["files"].update({"/etc/passwd": m["files"]["a/b.txt"]}),
        r"files\./etc/passwd: a file must lie in the twin's folder",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line_that_names_the_key(tmp_path: Path, content: dict[str, Any], case: str) -> None:
    change, words = DAMAGE[case]
    change(content)
    with pytest.raises(
        ArtifactError, match=rf"twin\.json is damaged: {words}.*; copy or build the twin again$"
    ) as caught:
        TwinArtifact.open(rewritten(tmp_path, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"{", "is damaged: Expecting property name.*; copy or build the twin again$"),
        (b"\xff", "is damaged: 'utf-8' codec"),
        (b'{"format_version": 1, "format_version": 1}', "is damaged: key 'format_version' stands twice"),
        (b'{"format_version": NaN}', "is damaged: NaN is not a JSON number"),
        (b"[" * 10**5, "is damaged: it is nested too deeply"),
        (b"[1]", "format_version must be 1, found None; rebuild"),
        (b'{"format_version": 2}', "format_version must be 1, found 2; rebuild"),
        (b'{"format_version": 1}', "is damaged: key 'created' is missing"),
    ],
)
def test_a_file_that_is_no_manifest_is_named(tmp_path: Path, raw: bytes, words: str) -> None:
    (tmp_path / MANIFEST).write_bytes(raw)
    with pytest.raises(ArtifactError, match=rf"twin\.json:? {words}"):
        read_manifest(tmp_path)


def test_a_folder_without_a_manifest_is_no_twin(tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"is no twin: twin\.json cannot be read \(No such file or directory\); build"
    ):
        read_manifest(tmp_path)


PLACES = st.integers(0, 10**6)
VALUES = st.sampled_from([None, [], {}, "", "x", -1, 1.5, True, 10**30, ["a"], {"a": 1}])


@given(place=PLACES, value=VALUES, gone=st.booleans())
def test_whatever_is_changed_in_a_manifest_is_an_error_of_ours_or_a_manifest(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: object, gone: bool
) -> None:
    """Never a KeyError, a TypeError or an AttributeError, when it is opened or when it is looked at."""
    content = json.loads(json.dumps({**manifest_of(["ag", "sms"]).content(), "format_version": 1, "files": {}}))
    owners = [content]
    for owner in owners:
        owners += [inner for inner in owner.values() if isinstance(inner, dict)]
    places = [(owner, key) for owner in owners for key in owner]
    owner, key = places[place % len(places)]
    owner[key] = value
    if gone:
        del owner[key]
    folder = rewritten(tmp_path_factory.mktemp("twin"), content)
    try:
        artifact = TwinArtifact.open(folder)
    except ArtifactError as error:
        if "twin.json" in str(error):
            return
        raise
    assert set(artifact.kinds) == set(artifact.manifest.tensors)
    assert sum(artifact.bytes_per_part().values()) == (folder / MANIFEST).stat().st_size
    router = artifact.manifest.recipe.router
    assert router is None or router.method is not None


# ---- sources


def test_sources_are_recorded_as_another_machine_may_read_them(tmp_path: Path) -> None:
    root = tmp_path / "recipes"
    rows = {"router_data": str(tmp_path / "data" / "x.jsonl")}
    experts = {
        "a": {"model": "someone/a", **rows},
        "b": {"model": "../models/b", **rows},
        "c": {"model": "/usr", **rows},
    }
    shared = {
        "method": "regmean",
        "calibration_data": {name: str(tmp_path / "data" / f"{name}.jsonl") for name in experts},
    }
    content = {"base": str(tmp_path / "models" / "base"), "experts": experts, "shared": shared, "root": root}
    recipe = Recipe.model_validate(content)
    record = record_recipe(recipe)
    assert record.base == "../models/base"
    assert record.shared["calibration_data"] == {name: f"../data/{name}.jsonl" for name in experts}
    assert {n: (s.model, s.router_data) for n, s in record.experts.items()} == {
        "a": ("someone/a", "../data/x.jsonl"),
        "b": ("../models/b", "../data/x.jsonl"),
        "c": ("usr", "../data/x.jsonl"),
    }
    assert str(tmp_path) not in json.dumps(record.content())
    assert record_root(recipe, tmp_path / "twins" / "new") == "../../recipes"
    assert record_root(recipe, Path("/usr/twin")) is None
