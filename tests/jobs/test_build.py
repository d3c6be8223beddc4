"""The whole build: one recipe, one folder, whole or not at all; whatever is wrong with the input is one line."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import yaml

from tests import tiny
from tests.refusals import config, value, weights
from tests.tiny import EXPERTS, GATE_ORDER, Family
from twinmerge.errors import InputError, OutputExistsError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.hashes import sha256_of
from twinmerge.hf.loading import load_backbone, load_tokenizer
from twinmerge.hf.model import TwinModel
from twinmerge.hf.router_data import EncodedRows
from twinmerge.jobs import build as module
from twinmerge.jobs import grow
from twinmerge.jobs.build import build, left_out
from twinmerge.jobs.export import export
from twinmerge.jobs.preflight import router_rows
from twinmerge.models.compatible import Allow
from twinmerge.models.provenance import describe_input
from twinmerge.routing.store import load_router
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.twin.features import Layers
from twinmerge.twin.recipe import RouterSettings

Get = Callable[[str], Family]
Twins = Callable[..., Path]


@pytest.fixture
def bert(family: Get, tmp_path: Path) -> Family:
    """A copy that a test may damage, with a recipe in YAML."""
    found = Family(shutil.copytree(family("bert").root, tmp_path / "bert"))
    write_recipe(found)
    return found


def write_recipe(family: Family, **changes: Any) -> Path:
    sources = {name: {"model": name, "router_data": f"{name}.jsonl"} for name in family.experts}
    recipe = {"base": "base", "experts": sources, "exclusive": {"rank": 2}, **changes}
    (family.root / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return family.root / "recipe.yaml"


def hashes(folder: Path) -> dict[str, str]:
    """Every file's, of the manifest all but the time it was made and the order in the recipe."""
    found = {p.relative_to(folder).as_posix(): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    manifest = json.loads((folder / "twin.json").read_text())
    del manifest["created"], manifest["files"]
    return {**found, "twin.json": json.dumps(manifest, sort_keys=True)}


# ---- what is built


def test_manifest_says_what_was_built_from_what(bert: Family, tmp_path: Path) -> None:
    artifact = build(bert.root / "recipe.yaml", tmp_path / "new" / "twin")
    manifest = artifact.manifest
    assert artifact.path == tmp_path / "new" / "twin"
    assert artifact.expert_names == GATE_ORDER
    assert manifest.recipe.exclusive.content()["rank"] == 2
    assert "root" not in manifest.recipe.content()
    assert (artifact.path / str(manifest.root)).resolve() == bert.root
    assert manifest.base == describe_input(Checkpoint.open(bert.base), "base")
    for name in GATE_ORDER:
        weights = bert.root / name / "model.safetensors"
        assert manifest.experts[name].files[weights.name].sha256 == sha256_of(weights)
    assert [manifest.experts[name].source for name in GATE_ORDER] == list(GATE_ORDER)
    assert set(manifest.versions) == {"twinmerge", "torch", "transformers", "safetensors"}
    assert {entry.kind for entry in manifest.tensors.values()} == {"linear", "vector", "embedding"}
    assert 0 <= manifest.router.accuracy <= 1
    assert artifact.verify() == len(manifest.files)


def test_nothing_that_is_written_names_a_path_of_the_builders_machine(bert: Family, tmp_path: Path) -> None:
    """Whatever the recipe says: absolute, relative, or elsewhere."""
    shutil.copytree(bert.root / "sms", tmp_path / "else" / "where")
    sources = {
        name: {"model": str(bert.root / name), "router_data": str(bert.root / f"{name}.jsonl")} for name in EXPERTS
    }
    sources["sms"]["model"] = "../else/where"
    recipe = write_recipe(bert, base=str(bert.base), experts=sources)
    artifact = build(recipe, tmp_path / "twin")
    assert artifact.manifest.recipe.base == artifact.manifest.base.source == "base"
    assert artifact.manifest.experts["sms"].source == "../else/where"
    assert artifact.manifest.recipe.experts["ag"].router_data == "ag.jsonl"
    export(tmp_path / "twin", tmp_path / "peft", to="peft")
    export(tmp_path / "twin", tmp_path / "stacked", to="stacked-lora")
    grow.remove(tmp_path / "twin", "ag", out=tmp_path / "smaller")
    grow.add(tmp_path / "smaller", "ag", model=bert.root / "ag", router_data=bert.root / "ag.jsonl")
    for folder in ("twin", "peft", "stacked", "smaller"):
        for path in (tmp_path / folder).rglob("*"):
            if path.is_file():
                assert str(tmp_path).encode() not in path.read_bytes(), path


def test_model_card_names_experts_and_figures(twin: Twins) -> None:
    card = (twin("bert") / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: twinmerge\n")
    for name in GATE_ORDER:
        assert re.search(rf"^\| {name} \| .*{name} \| [\d.]+ \| 100\.0% \|$", card, re.MULTILINE)
    assert "linear on features `speculative`" in card


def test_bytes_reported_are_the_bytes_on_disk(twin: Twins) -> None:
    for name in ("bert", "llama"):
        folder = twin(name)
        parts = TwinArtifact.open(folder).bytes_per_part()
        assert sum(parts.values()) == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_router_is_fitted_on_the_shared_experts_features(family: Get, twin: Twins) -> None:
    folder = twin("bert", router={"features": "all"})
    model = TwinModel(load_backbone(folder), {name: {} for name in GATE_ORDER}, tokenizer=load_tokenizer(folder))
    rows = {name: tiny.text_rows(name) for name in GATE_ORDER}
    every = EncodedRows.of(model, [row for part in rows.values() for row in part])
    router = load_router(TwinArtifact.open(folder).path / "router")
    right = router.route(every).expert == torch.arange(3).repeat_interleave(24)
    assert float(right.float().mean()) > 0.9
    assert router.report["inputs_per_expert"] == 24
    loaded = TwinModel.from_pretrained(folder)
    x = loaded.tokenizer([rows["sms"][0]["text"]], return_tensors="pt")
    assert torch.allclose(loaded.features(**x), every.take(torch.tensor([24])).hidden(Layers("all")), atol=1e-5)


@pytest.mark.parametrize("method", ["mlp", "centroid", "knn"])
def test_every_router_can_be_built(bert: Family, tmp_path: Path, method: str) -> None:
    router = {"method": method, "features": "layers:[0, 1]", "samples_per_expert": 10}
    artifact = build(write_recipe(bert, router=router), tmp_path / "twin")
    assert artifact.manifest.router.inputs_per_expert == 10
    assert sum("10 of its 24 rows are used" in note for note in artifact.manifest.notes) == 3
    assert TwinModel.from_pretrained(tmp_path / "twin").route(input_ids=torch.tensor([[5, 6]])).shape == (1, 3)


def test_rows_that_the_router_does_not_use_are_noted() -> None:
    rows = {name: tiny.text_rows(name, count) for name, count in (("ag", 12), ("sms", 10), ("trec", 3))}
    (note,) = left_out(rows, RouterSettings(samples_per_expert=10))
    assert note == "experts.ag.router_data: 10 of its 12 rows are used, drawn at random (router.samples_per_expert)"


def test_progress_goes_through_all_stages(bert: Family, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    build(bert.root / "recipe.yaml", tmp_path / "twin", progress=lambda *step: told.append(step))
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == [
        "decomposing",
        "writing experts",
        "hashing experts",
        "router features",
        "router fitted",
        "checking experts",
    ]
    looked = [step for step in told if step[0] == "router features"]
    assert looked[-1][1:] == (83, 83)  # 72 rows, 11 again under wrong gates


def test_maximum_length_of_the_recipe_is_the_models(bert: Family, tmp_path: Path) -> None:
    build(write_recipe(bert, max_length=3), tmp_path / "twin")
    assert TwinModel.from_pretrained(tmp_path / "twin").max_length == 3


def test_sharded_checkpoints_give_the_same_twin(bert: Family, tmp_path: Path) -> None:

    build(bert.root / "recipe.yaml", tmp_path / "whole")
    for name in ("base", *EXPERTS):
        cls = transformers.BertModel if name == "base" else transformers.BertForSequenceClassification
        model = cls.from_pretrained(bert.root / name)
        (bert.root / name / "model.safetensors").unlink()
        model.save_pretrained(bert.root / name, max_shard_size="8KB")
        assert (bert.root / name / "model.safetensors.index.json").exists()
    build(bert.root / "recipe.yaml", tmp_path / "sharded")
    whole, sharded = hashes(tmp_path / "whole"), hashes(tmp_path / "sharded")
    assert {k: v for k, v in whole.items() if k.endswith(".safetensors")} == {
        k: v for k, v in sharded.items() if k.endswith(".safetensors")
    }


# ---- one seed, one result


@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_order_of_experts_in_the_recipe_changes_no_byte(bert: Family, tmp_path: Path, router: str) -> None:
    for number, order in enumerate((EXPERTS, EXPERTS[::-1])):
        recipe = write_recipe(
            Family(bert.root, order), router={"method": router, "epochs": 2}, exclusive={"budget": 2.0}
        )
        build(recipe, tmp_path / str(number))
    assert hashes(tmp_path / "0") == hashes(tmp_path / "1")


def test_seed_changes_the_router(bert: Family, tmp_path: Path) -> None:
    for seed in (0, 1):
        build(write_recipe(bert, seed=seed), tmp_path / str(seed))
    first, second = hashes(tmp_path / "0"), hashes(tmp_path / "1")
    assert first["model.safetensors"] == second["model.safetensors"]
    assert first["router/router.safetensors"] != second["router/router.safetensors"]


# ---- the place to write to


def test_folder_that_exists_is_refused_before_anything_is_read(bert: Family, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    shutil.rmtree(bert.root / "sms")
    with pytest.raises(OutputExistsError, match="out .*exists"):
        build(bert.root / "recipe.yaml", out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_folder_that_exists_is_replaced_whole_when_asked(bert: Family, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    build(bert.root / "recipe.yaml", out, overwrite=True)
    assert not (out / "old.txt").exists()
    TwinArtifact.open(out).verify()
    shutil.rmtree(bert.root / "sms")
    with pytest.raises(InputError, match=r"experts\.sms\.model"):
        build(bert.root / "recipe.yaml", out, overwrite=True)
    TwinArtifact.open(out).verify()  # what was there is there


# ---- crashes


KILLER = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from twinmerge.jobs import build as module
from twinmerge.jobs import grow
from twinmerge.jobs.build import build
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.merging.executor import Threads
import peft, sklearn.linear_model, transformers

recipe, out, times = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
os.fsync = lambda _: None

def child(seconds=None):
    # A fork of a process that has imported everything and computed nothing yet; killed after so many seconds.
    pid = os.fork()
    if not pid:
        try:
            build(recipe, out, resume=True, executor=Threads(2))
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\\n")
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]

start = time.perf_counter()
assert child() == 0
length = time.perf_counter() - start
out.rename(out.with_name("calm"))
moments = random.Random(0)
for number in range(times):
    child((number + moments.random()) / times * 1.1 * length)  # from all over the build
    complete = out.exists()
    if complete:
        TwinArtifact.open(out).verify()
    left = (out.parent / f".{out.name}.partial").exists()
    assert complete or child() == 0
    out.rename(out.with_name(str(number)))
    print(complete, left)
"""


def test_no_moment_of_a_kill_leaves_a_wrong_twin_and_resuming_gives_the_same_bits(bert: Family, tmp_path: Path) -> None:
    router = {"method": "centroid", "features": "last"}  # twenty builds: the cheapest router
    recipe = write_recipe(bert, exclusive={"budget": 2.0}, shared={"method": "ties"}, router=router)
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(recipe), str(tmp_path / "twin"), "10"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 10
    assert "False True" in done.stdout  # some were killed at work
    calm = hashes(tmp_path / "calm")
    for number in range(10):
        assert hashes(tmp_path / str(number)) == calm
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_finished_parameters_are_verified_and_not_computed_again(
    bert: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = bert.root / "recipe.yaml"
    build(recipe, tmp_path / "calm")

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "fit_on", crash)
        with pytest.raises(KeyboardInterrupt):
            build(recipe, tmp_path / "twin")
    parts = sorted((tmp_path / ".twin.partial" / "work").iterdir())
    parts[0].write_bytes(parts[0].read_bytes()[:-1] + b"x")
    parts[1].unlink()
    told: list[tuple[str, int, int]] = []
    build(recipe, tmp_path / "twin", resume=True, progress=lambda *step: told.append(step))
    assert told[0] == ("decomposing", len(parts) - 2, len(parts))
    assert hashes(tmp_path / "twin") == hashes(tmp_path / "calm")


def test_work_of_other_inputs_is_not_gone_on_with(bert: Family, tmp_path: Path) -> None:
    (tmp_path / ".twin.partial").mkdir()
    (tmp_path / ".twin.partial" / "journal").write_text('{"fingerprint": {"recipe": "%s"}}\n["a", "b"]\n' % ("0" * 64))
    with pytest.raises(OutputExistsError, match="left by a run with another recipe or other inputs"):
        build(bert.root / "recipe.yaml", tmp_path / "twin", resume=True)


def test_two_builds_into_one_folder_do_not_race(bert: Family, tmp_path: Path) -> None:
    refused: list[str] = []

    def meanwhile(stage: str, done: int, total: int) -> None:
        if stage == "writing experts" and not refused:
            with pytest.raises(OutputExistsError, match="another process holds") as caught:
                build(bert.root / "recipe.yaml", tmp_path / "twin", resume=True)
            refused.append(str(caught.value))

    build(bert.root / "recipe.yaml", tmp_path / "twin", progress=meanwhile)
    assert refused
    TwinArtifact.open(tmp_path / "twin").verify()


def test_failed_build_leaves_no_empty_parents(bert: Family, tmp_path: Path) -> None:
    value("classifier.bias", float("nan"))(bert.root)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match="NaN"):
        build(bert.root / "recipe.yaml", tmp_path / "a" / "b" / "twin")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_full_disk_and_little_memory_are_said_before_any_work(
    bert: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"--memory must be at least 451 MB for '.*', found 1$"):
        build(bert.root / "recipe.yaml", tmp_path / "twin", memory_bytes=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(OSError, match="GB are needed"):
        build(bert.root / "recipe.yaml", tmp_path / "a" / "twin")
    assert [path.name for path in tmp_path.iterdir()] == ["bert"]


def test_differences_that_are_allowed_are_noted(bert: Family, tmp_path: Path) -> None:
    config("sms", lambda content: content.update(layer_norm_eps=1e-3))(bert.root)
    torch.manual_seed(1)
    weights("trec", lambda t: {k: torch.randn_like(v) * v.std() if v.ndim > 1 else v for k, v in t.items()})(bert.root)
    recipe = bert.root / "recipe.yaml"
    with pytest.raises(InputError, match=r"'sms' is another model: layer_norm_eps is 1e-12 in base and 0\.001 in sms"):
        build(recipe, tmp_path / "twin")
    with pytest.raises(InputError, match="'trec' is no fine-tune of this base: .* or --allow-unrelated"):
        build(recipe, tmp_path / "twin", allow=Allow(config=True))
    notes = build(recipe, tmp_path / "twin", allow=Allow(config=True, unrelated=True)).manifest.notes
    assert "'sms': layer_norm_eps is 1e-12 in base and 0.001 in sms" in notes


def test_rows_are_read_before_any_work(bert: Family) -> None:
    rows = router_rows(bert.plan())
    assert tuple(rows) == GATE_ORDER
    assert rows["sms"] == tiny.text_rows("sms")
