"""Growing and shrinking: what stays keeps its bits, what is new is what a build makes, a failure is no change."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from tests.tiny import GATE_ORDER, Family
from twinmerge.errors import ArtifactError, DataError, InputError, MismatchError, OutputExistsError, RecipeError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.hashes import sha256_of
from twinmerge.hf.model import TwinModel
from twinmerge.jobs import grow
from twinmerge.jobs.build import build, finish
from twinmerge.routing.store import load_router
from twinmerge.tensors.parts import Part
from twinmerge.twin.artifact import TwinArtifact

Get = Callable[[str], Family]


@pytest.fixture(scope="module")
def source(family: Get, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family and a twin built from it beside it, to be copied by each test."""
    root = tmp_path_factory.mktemp("grow") / "source"
    shutil.copytree(family("bert").root, root)
    build(Family(root).recipe(exclusive={"rank": 3}), root / "twin")
    return root


@pytest.fixture
def twin(source: Path, tmp_path: Path) -> Path:
    """Its recipe's paths start in `source`, which stays."""
    folder = Path(shutil.copytree(source / "twin", tmp_path / "twin"))
    change_manifest(folder, lambda m: m.update(root=os.path.relpath(source, folder)))
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def of_others(found: dict[str, str], name: str) -> dict[str, str]:
    """All but what a change of this expert may touch."""
    touched = ("router/", f"experts/{name}/", "README.md", "twin.json")
    return {file: digest for file, digest in found.items() if not file.startswith(touched)}


def new_expert(source: Path, folder: Path, name: str = "news") -> dict[str, Path]:
    """Another fine-tune of the base: the mean of two experts, with the head of one."""
    shutil.copytree(source / "sms", folder / name)
    other = Checkpoint.open(source / "trec")

    def mix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: t if "classifier" in n else (t + other.read(n)) / 2 for n, t in tensors.items()}

    tiny.rewrite(folder / name / "model.safetensors", mix)
    rows = [{"text": f"w6 w{20 + i % 9} w60 w61 w62"} for i in range(24)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": folder / name, "router_data": folder / f"{name}.jsonl"}


def entries(part: Part) -> list[torch.Tensor]:
    return list(part.pack().values())


# ---- what stays, what is new


def test_added_expert_leaves_every_other_files_bits(source: Path, twin: Path, tmp_path: Path) -> None:
    before = hashes(twin)
    inode = (twin / "model.safetensors").stat().st_ino
    artifact = grow.add(twin, "news", **new_expert(source, tmp_path))
    after = hashes(twin)
    assert of_others(after, "news") == of_others(before, "news")
    assert (twin / "model.safetensors").stat().st_ino == inode  # nothing was copied
    assert artifact.expert_names == ("ag", "news", "sms", "trec") == load_router(artifact.path / "router").expert_names
    assert artifact.verify() == len(after) - 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["news", "news.jsonl", "twin"]


def test_added_expert_of_whole_rank_is_that_expert(source: Path, tmp_path: Path) -> None:
    recipe = Family(source).recipe(exclusive={"rank": 64, "embeddings": "exclusive"})
    build(recipe, tmp_path / "twin")
    new = new_expert(source, tmp_path)
    grow.add(tmp_path / "twin", "news", **new)
    model = TwinModel.from_pretrained(tmp_path / "twin")
    x = model.tokenizer(["w5 w6 w7", "w60 w61"], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = tiny.transformers.BertForSequenceClassification.from_pretrained(new["model"]).eval()(**x).logits
    assert torch.allclose(torch.stack(model(**x, expert="news").logits), expected, atol=1e-5)
    sms = tiny.transformers.BertForSequenceClassification.from_pretrained(source / "sms").eval()
    with torch.no_grad():
        assert torch.allclose(torch.stack(model(**x, expert="sms").logits), sms(**x).logits, atol=1e-5)


def test_router_knows_the_new_experts_inputs(source: Path, twin: Path, tmp_path: Path) -> None:
    grow.add(twin, "news", **new_expert(source, tmp_path))
    model = TwinModel.from_pretrained(twin)
    assert model(**model.tokenizer(["w6 w22 w60 w61 w62"], return_tensors="pt")).expert == ["news"]


@pytest.mark.parametrize("exclusive", [{"rank": 3}, {"energy": 0.8}])
@pytest.mark.parametrize("name", ["ag", "trec"])
def test_expert_replaced_by_itself_gives_the_twin_back(
    source: Path, tmp_path: Path, name: str, exclusive: dict[str, Any]
) -> None:
    built = build(Family(source).recipe(exclusive=exclusive), tmp_path / "twin")
    before = hashes(built.path)
    again = grow.replace(built.path, name, model=source / name, router_data=source / f"{name}.jsonl")
    after = hashes(built.path)
    assert {f: h for f, h in after.items() if f != "twin.json" and f != "README.md"} == {
        f: h for f, h in before.items() if f != "twin.json" and f != "README.md"
    }
    assert again.manifest.experts == built.manifest.experts
    assert again.manifest.tensors == built.manifest.tensors
    assert again.manifest.router == built.manifest.router


def test_removed_expert_is_gone_and_comes_back(source: Path, twin: Path) -> None:
    before = hashes(twin)
    artifact = grow.remove(twin, "sms")
    assert artifact.expert_names == ("ag", "trec") == load_router(artifact.path / "router").expert_names
    assert all("sms" not in entry.ranks for entry in artifact.manifest.tensors.values())
    assert not (twin / "experts" / "sms").exists()
    assert of_others(hashes(twin), "sms") == of_others(before, "sms")
    grow.add(twin, "sms", model=source / "sms", router_data=source / "sms.jsonl")
    after = hashes(twin)
    assert {f for f in before if before[f] != after[f]} == {"README.md", "twin.json"}


def test_a_twin_with_weights_by_expert_can_change_its_experts(source: Path, tmp_path: Path) -> None:
    shared = {"method": "task_arithmetic", "weight": {"ag": 1.0, "sms": 0.5, "trec": 0.25}}
    build(Family(source).recipe(shared=shared, exclusive={"rank": 1}), tmp_path / "twin")
    grow.add(tmp_path / "twin", "news", **new_expert(source, tmp_path))
    grow.remove(tmp_path / "twin", "ag")
    assert TwinArtifact.open(tmp_path / "twin").expert_names == ("news", "sms", "trec")


def test_adapter_can_be_added(tmp_path: Path) -> None:
    family, merged = tiny.adapter_family(tmp_path / "family")
    two = Family(family.root, ("trec", "sms"))
    build(two.recipe(exclusive={"rank": 64, "embeddings": "exclusive"}), tmp_path / "twin")
    grow.add(tmp_path / "twin", "ag", model=family.root / "ag", router_data=family.root / "ag.jsonl")
    model = TwinModel.from_pretrained(tmp_path / "twin")
    x = model.tokenizer(["w5 w6 w7"], return_tensors="pt")
    for name, expert in merged.items():
        with torch.no_grad():
            assert torch.allclose(torch.stack(model(**x, expert=name).logits), expert(**x).logits, atol=1e-5)


def test_experts_without_heads_can_be_exchanged(family: Get, tmp_path: Path) -> None:
    root = family("llama").root
    build(Family(root).recipe(exclusive={"rank": 2}), tmp_path / "twin")
    artifact = grow.replace(tmp_path / "twin", "ag", model=root / "sms", router_data=root / "ag.jsonl")
    parts, others = artifact.exclusive("ag"), artifact.exclusive("sms")
    assert parts.keys() == others.keys()
    assert all(torch.equal(a, b) for n in parts for a, b in zip(entries(parts[n]), entries(others[n]), strict=False))


def test_sparse_knowledge_can_be_added(source: Path, tmp_path: Path) -> None:
    recipe = Family(source).recipe(exclusive={"compression": "magnitude", "density": 0.1})
    build(recipe, tmp_path / "twin")
    new = new_expert(source, tmp_path)
    artifact = grow.add(tmp_path / "twin", "news", **new)
    assert 0 < artifact.manifest.experts["news"].energy_kept < 1


# ---- the recipe and the manifest


def test_budget_is_shared_out_and_the_recipe_says_so(source: Path, tmp_path: Path) -> None:
    built = build(Family(source).recipe(exclusive={"budget": 1.5, "dtype": None}), tmp_path / "twin")
    before = dict(built.bytes_per_part())
    artifact = grow.add(built.path, "news", **new_expert(source, tmp_path))
    assert artifact.manifest.recipe.exclusive.content()["budget"] == 2.0
    base = artifact.manifest.base.bytes
    share = 0.5 * base
    added = artifact.bytes_per_part()["exclusive"] - before["exclusive"]
    config = (artifact.path / "experts/news/adapter_config.json").stat().st_size
    assert 0.5 * share < added - config <= share  # of so small a model headers take much
    assert grow.remove(built.path, "news").manifest.recipe.exclusive.content()["budget"] == 1.5


def test_manifest_says_what_was_changed_and_how_to_rebuild(source: Path, twin: Path, tmp_path: Path) -> None:
    from twinmerge.twin.recipe import Recipe

    new = new_expert(source, tmp_path)
    (new["model"] / "README.md").write_text("---\nlicense: mit\n---\n")
    grow.add(twin, "news", **new)
    manifest = grow.remove(twin, "sms").manifest
    assert [(c.change, c.expert) for c in manifest.changes] == [("add", "news"), ("remove", "sms")]
    entry = manifest.experts["news"]
    assert ((source / entry.source).resolve(), entry.licence) == (new["model"], "mit")
    weights = new["model"] / "model.safetensors"
    assert entry.files["model.safetensors"].content() == {"bytes": weights.stat().st_size, "sha256": sha256_of(weights)}
    card = (twin / "README.md").read_text()
    assert "merged before these changes: add news, remove sms." in card
    assert "news: mit" in card
    root = (twin / str(manifest.root)).resolve()
    again = build(Recipe.model_validate({**manifest.recipe.content(), "root": root}), tmp_path / "again")
    assert again.expert_names == ("ag", "news", "trec")


def test_model_of_the_hub_is_recorded_by_its_name(
    source: Path, twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = new_expert(source, tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(new["model"]))
    artifact = grow.add(twin, "news", model="someone/news", router_data=new["router_data"])
    assert artifact.manifest.recipe.experts["news"].model == "someone/news"


def test_paths_are_those_of_the_working_directory(
    source: Path, twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_expert(source, tmp_path)
    change_manifest(twin, lambda m: m["base"].pop("files"))  # a base that was not hashed cannot be compared
    monkeypatch.chdir(tmp_path)
    artifact = grow.add("twin", "news", model="news", router_data="news.jsonl")
    found = artifact.manifest.recipe.experts["news"]
    assert [(source / path).resolve() for path in (found.model, found.router_data)] == [
        tmp_path / "news",
        tmp_path / "news.jsonl",
    ]


def test_moved_inputs_are_found_under_another_root(source: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(source, tmp_path / "moved"))
    manifest = json.loads((moved / "twin" / "twin.json").read_text())
    (moved / "twin" / "twin.json").write_text(json.dumps({**manifest, "root": str(tmp_path / "gone")}))
    with pytest.raises(RecipeError, match=r"router_data: .*gone/\w+\.jsonl is not there.*--root"):
        grow.remove(moved / "twin", "ag")
    artifact = grow.remove(moved / "twin", "ag", root=moved)
    assert artifact.manifest.root == ".."
    del manifest["root"]
    (moved / "twin" / "twin.json").write_text(json.dumps(manifest))


# ---- elsewhere


def test_new_twin_is_written_elsewhere_and_shares_no_file(source: Path, twin: Path, tmp_path: Path) -> None:
    before = hashes(twin)
    out = tmp_path / "new" / "twin"
    artifact = grow.remove(twin, "sms", out=out)
    assert artifact.path == out
    assert hashes(twin) == before
    assert (out / "model.safetensors").stat().st_ino != (twin / "model.safetensors").stat().st_ino
    with pytest.raises(OutputExistsError, match="exists already"):
        grow.remove(twin, "ag", out=out)
    assert grow.remove(twin, "ag", out=out, overwrite=True).expert_names == ("sms", "trec")


def test_files_are_copied_where_the_disk_has_no_links(
    source: Path, twin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    before = hashes(twin)
    grow.remove(twin, "sms")
    assert of_others(hashes(twin), "sms") == of_others(before, "sms")


# ---- what is refused, and leaves no trace


def cut_short(source: Path, twin: Path, new: dict[str, Path]) -> None:
    tiny.rewrite(new["model"] / "model.safetensors", lambda t: dict(list(t.items())[3:]))


def poison(source: Path, twin: Path, new: dict[str, Path]) -> None:
    tiny.rewrite(new["model"] / "model.safetensors", lambda t: {n: v * float("nan") for n, v in t.items()})


def unrelated(source: Path, twin: Path, new: dict[str, Path]) -> None:
    tiny.rewrite(new["model"] / "model.safetensors", lambda t: {n: torch.randn(v.shape) for n, v in t.items()})


def headless(source: Path, twin: Path, new: dict[str, Path]) -> None:
    shutil.rmtree(new["model"])
    shutil.copytree(source / "base", new["model"])


def without_pooler(source: Path, twin: Path, new: dict[str, Path]) -> None:
    tiny.rewrite(new["model"] / "model.safetensors", lambda t: {n: v for n, v in t.items() if "pooler" not in n})


def one_row(source: Path, twin: Path, new: dict[str, Path]) -> None:
    new["router_data"].write_text('{"text": "w5"}\n')


def damaged(source: Path, twin: Path, new: dict[str, Path]) -> None:
    content = bytearray((twin / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (twin / "model.safetensors").write_bytes(content)


def of_another_base(source: Path, twin: Path, new: dict[str, Path]) -> None:
    change_manifest(twin, lambda m: m["base"]["files"]["model.safetensors"].update(sha256="0" * 64))


def without_root(source: Path, twin: Path, new: dict[str, Path]) -> None:
    change_manifest(twin, lambda m: m.pop("root"))


def with_odd_recipe(source: Path, twin: Path, new: dict[str, Path]) -> None:
    change_manifest(twin, lambda m: m["recipe"].update(seed=-1))


def change_manifest(twin: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((twin / "twin.json").read_text())
    change(manifest)
    (twin / "twin.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (cut_short, MismatchError, r"'news' lacks \d+ of"),
        (poison, InputError, "expert 'news': .* NaN"),
        (unrelated, MismatchError, "'news' is no fine-tune of this base"),
        (headless, MismatchError, "expert 'ag' has a head of its own, expert 'news' has none; give all or none"),
        (without_pooler, MismatchError, "expert 'news' lacks 2 of 41 parameters, first 'pooler.dense.bias'"),
        (one_row, DataError, r"experts\.news\.router_data holds 1 row"),
        (damaged, ArtifactError, r"model\.safetensors changed"),
        (of_another_base, MismatchError, r"base .* is not what the twin was built from: model\.safetensors"),
        (without_root, ArtifactError, r"does not say where its recipe's paths start.*--root"),
        (with_odd_recipe, ArtifactError, r"its recipe is not valid \(Input should be greater"),
    ],
)
def test_what_cannot_be_added_is_one_line_and_no_change(
    source: Path,
    twin: Path,
    tmp_path: Path,
    damage: Callable[[Path, Path, dict[str, Path]], None],
    error: type[Exception],
    message: str,
) -> None:
    new = new_expert(source, tmp_path)
    damage(source, twin, new)
    before, beside = hashes(twin), sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(error, match=message) as caught:
        grow.add(twin, "news", **new)
    assert "\n" not in str(caught.value)
    assert hashes(twin) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == beside


def test_expert_whose_class_reads_less_can_be_added(source: Path, twin: Path, tmp_path: Path) -> None:
    new = new_expert(source, tmp_path)
    config = transformers.BertConfig.from_pretrained(new["model"])
    whole = transformers.BertForTokenClassification.from_pretrained(new["model"], config=config)  # has no pooler
    whole.save_pretrained(new["model"])
    artifact = grow.add(twin, "news", **new)
    ranks = artifact.manifest.tensors["pooler.dense.weight"].ranks
    assert sorted(ranks) == ["ag", "sms", "trec"]


def test_expert_with_a_head_is_named_where_the_others_have_none(source: Path, twin: Path, tmp_path: Path) -> None:
    shutil.rmtree(twin / "experts/ag/head")
    shutil.rmtree(twin / "experts/sms/head")
    shutil.rmtree(twin / "experts/trec/head")
    change_manifest(twin, lambda m: m.update(files={f: e for f, e in m["files"].items() if "/head/" not in f}))
    with pytest.raises(MismatchError, match="expert 'news' has a head of its own, expert 'ag' has none"):
        grow.add(twin, "news", **new_expert(source, tmp_path))


def test_budget_that_cannot_hold_the_norms_is_refused(source: Path, tmp_path: Path) -> None:
    build(Family(source).recipe(exclusive={"budget": 1.5}), tmp_path / "twin")
    change_manifest(tmp_path / "twin", lambda m: m["recipe"]["exclusive"].update(budget=0.01))
    with pytest.raises(RecipeError, match=r"cannot hold the biases and norms of 4 experts; it must be at least \d"):
        grow.add(tmp_path / "twin", "news", **new_expert(source, tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, new: grow.add(t, "sms", **new), "the twin has an expert 'sms' already; replace it"),
        (lambda t, new: grow.add(t, "SMS", **new), "must differ in more than case"),
        (lambda t, new: grow.add(t, "a/b", **new), "an expert's name is letters"),
        (lambda t, new: grow.replace(t, "news", **new), "unknown expert 'news'; this twin has ag, sms, trec"),
        (lambda t, new: grow.remove(t, "news"), "unknown expert 'news'"),
        (lambda t, new: grow.remove(t.parent, "news"), "is no twin"),
        (lambda t, new: grow.add(t, "news", **{**new, "model": "./nowhere"}), "the new expert: no file or folder"),
        (lambda t, new: grow.add(t, "news", **{**new, "router_data": "no.jsonl"}), r"no\.jsonl is not there"),
    ],
)
def test_names_and_paths_that_cannot_be_are_refused(
    source: Path, twin: Path, tmp_path: Path, change: Callable[[Path, dict[str, Path]], object], message: str
) -> None:
    new = new_expert(source, tmp_path)
    before = hashes(twin)
    with pytest.raises(InputError, match=message):
        change(twin, new)
    assert hashes(twin) == before


def test_two_experts_are_the_fewest(twin: Path) -> None:
    grow.remove(twin, "ag")
    with pytest.raises(RecipeError, match="a twin needs at least two experts, found 1"):
        grow.remove(twin, "sms")


def test_failure_late_leaves_the_old_twin(
    source: Path, twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, before = new_expert(source, tmp_path), hashes(twin)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(grow, "finish", fail)
        with pytest.raises(OSError, match="No space.*\n.* parts are kept: go on with --resume"):
            grow.add(twin, "news", **new)
    assert hashes(twin) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".twin.partial", "news", "news.jsonl", "twin"]
    assert grow.add(twin, "news", **new, resume=True).expert_names == ("ag", "news", "sms", "trec")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["news", "news.jsonl", "twin"]


def test_what_a_killed_change_left_is_cleared_away(twin: Path) -> None:
    (twin.parent / ".twin.partial").mkdir()
    (twin.parent / ".twin.partial" / "half.safetensors").write_text("x")
    grow.remove(twin, "sms")
    assert [path.name for path in twin.parent.iterdir()] == ["twin"]


def test_two_changes_at_once_do_not_race(source: Path, twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(*arguments: Any, **settings: Any) -> Any:
        with pytest.raises(OutputExistsError, match="another process holds"):
            grow.remove(twin, "ag")
        return finish(*arguments, **settings)

    monkeypatch.setattr(grow, "finish", second)
    assert grow.remove(twin, "sms").expert_names == ("ag", "trec")
    assert GATE_ORDER == ("ag", "sms", "trec")
    assert TwinArtifact.open(twin).verify()
