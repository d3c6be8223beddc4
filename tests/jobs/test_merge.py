"""Static merges: the reference, the same bits in any chunks, every wrong input one line and nothing written."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import reference
from tests.tiny import write_checkpoint
from twinmerge.cli import main
from twinmerge.errors import OutputExistsError, RecipeError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.hashes import sha256_of
from twinmerge.files.target import JOURNAL, RESULT
from twinmerge.files.writer import save_tensors
from twinmerge.jobs.merge import MANIFEST, merge_models
from twinmerge.merging import plan as module
from twinmerge.merging.executor import Serial, Threads
from twinmerge.merging.recipe import depths
from twinmerge.models.compatible import Allow

State = dict[str, Tensor]
CONFIG = {"model_type": "llama", "rope_theta": 10000.0, "dtype": "float32"}


def write(folder: Path, tensors: State, config: dict[str, object] | None = None, shard: int = 10**9) -> Path:
    folder.mkdir(parents=True)
    write_checkpoint(folder, tensors, shard)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return folder


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    """A model of two layers; seeds above 0 are fine-tunes of seed 0."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (9, 4), "layers.0.w": (4, 6), "layers.1.w": (4, 6), "norm.weight": (4,)}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    generator.manual_seed(seed)
    if seed:
        state = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in state.items()}
    return {**{name: t.to(dtype) for name, t in state.items()}, "ids": torch.arange(3)}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    write(tmp_path / "base", tensors())
    write(tmp_path / "a", tensors(1), shard=100)
    write(tmp_path / "b", tensors(2))
    return tmp_path


def rewrite(folder: Path, edit: Callable[[State], State]) -> None:
    """Change the tensors of a model."""
    state, config = edit(read(folder)), json.loads((folder / "config.json").read_text())
    shutil.rmtree(folder)
    write(folder, state, config)


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def ours(folder: Path, shared: str = "{method: task_arithmetic, scaling: 0.3}", more: str = "") -> Path:
    return recipe(folder, f"base: base\nexperts: {{a: a, b: b}}\nshared: {shared}\n{more}")


def kit(folder: Path, method: str, parameters: str = "weight: 0.5", more: str = "") -> Path:
    entries = "".join(f"  - model: {folder / name}\n    parameters: {{{parameters}}}\n" for name in "ab")
    return recipe(folder, f"merge_method: {method}\nbase_model: {folder / 'base'}\nmodels:\n{entries}{more}")


def read(folder: Path) -> State:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.specs}


def floats(state: State) -> State:
    return {name: tensor.double() for name, tensor in state.items() if tensor.dtype.is_floating_point}


def change(folder: Path, edit: Callable[[State], object], config: dict[str, object] | None = None) -> None:
    state = tensors(1)
    edit(state)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    write(folder, state, config)


# ---- results


def test_task_arithmetic_is_the_reference_and_the_folder_is_a_model(models: Path) -> None:
    (models / "base" / "tokenizer.json").write_text('{"model": {"vocab": {"x": 0}}}')
    manifest = merge_models(ours(models), models / "out")
    merged = read(models / "out")
    expected = reference.task_arithmetic(floats(tensors()), {"a": floats(tensors(1)), "b": floats(tensors(2))}, 0.3)
    assert all(torch.allclose(merged[name].double(), expected[name], atol=1e-6) for name in expected)
    assert torch.equal(merged["ids"], torch.arange(3))
    names = {"config.json", "model.safetensors", "tokenizer.json", MANIFEST}
    assert {path.name for path in (models / "out").iterdir()} == names
    assert manifest == json.loads((models / "out" / MANIFEST).read_text())
    assert not [path for path in models.iterdir() if path.name.startswith(".")]


def test_manifest_names_the_inputs_their_licences_and_what_was_asked_of_their_bytes(models: Path) -> None:
    (models / "a" / "README.md").write_text("---\nlicense: mit\n---\n")
    cheap = merge_models(ours(models), models / "cheap")["inputs"]
    whole = merge_models(ours(models), models / "whole", hash_inputs=True)["inputs"]
    assert [(entry["source"], entry["licence"]) for entry in cheap] == [
        ("base", None),
        ("a", "mit"),
        ("b", None),
    ]
    manifest = merge_models(kit(models, "task_arithmetic", "weight: 1"), models / "kit", allow=Allow(config=True))
    assert manifest["recipe"]["experts"] == {"a": "a", "b": "b"}
    assert str(models) not in (models / "kit" / MANIFEST).read_text()
    for name, light, heavy in zip(("base", "a", "b"), cheap, whole, strict=True):
        assert light["bytes"] == Checkpoint.open(models / name).nbytes
        assert light["files"].keys() == heavy["files"].keys() == {p.name for p in (models / name).glob("*.safetensors")}
        for file, entry in heavy["files"].items():
            assert entry == {"bytes": (models / name / file).stat().st_size, "sha256": sha256_of(models / name / file)}
            assert set(light["files"][file]) == {"bytes", "header_sha256"}


@pytest.mark.parametrize("method", ["pretrained", "average", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_every_method_of_the_registry_has_the_same_bits_in_any_chunks(
    models: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ours(models, f"{{method: {method}}}")
    merge_models(path, models / "whole", executor=Threads(1))
    monkeypatch.setattr(module, "_CHUNK_ENTRIES", 5)
    merge_models(path, models / "parts", executor=Threads(3))
    assert all(torch.equal(tensor, read(models / "parts")[name]) for name, tensor in read(models / "whole").items())


def test_ties_within_tensors_streams_too(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ours(models, "{method: ties, scope: tensor}")
    merge_models(path, models / "whole")
    monkeypatch.setattr(module, "_CHUNK_ENTRIES", 5)
    merge_models(path, models / "parts")
    assert all(torch.equal(tensor, read(models / "parts")[name]) for name, tensor in read(models / "whole").items())


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("normalize", ["false", "true"])
def test_mergekit_methods_at_density_one_are_their_formulas(models: Path, method: str, normalize: str) -> None:
    merge_models(kit(models, method, more=f"parameters: {{normalize: {normalize}}}\n"), models / "out")
    base, vectors = floats(tensors()), [reference.task_vector(floats(tensors()), floats(tensors(i))) for i in (1, 2)]
    for name, merged in floats(read(models / "out")).items():
        first, second = (0.5 * vector[name] for vector in vectors)
        agree = (first + second) * first > 0, (first + second) * second > 0
        if method in ("task_arithmetic", "dare_linear"):
            agree = torch.ones_like(first) > 0, torch.ones_like(first) > 0
        total = first * agree[0] + second * agree[1]
        if normalize == "true":
            total = total / (0.5 * agree[0].double() + 0.5 * agree[1].double())
        assert torch.allclose(merged, base[name] + total, atol=1e-6)


def test_mergekit_ties_is_ties_within_each_tensor(models: Path) -> None:
    merge_models(kit(models, "ties", "weight: 1.0, density: 0.25"), models / "theirs")
    merge_models(ours(models, "{method: ties, density: 0.25, scope: tensor}"), models / "ours")
    found = floats(read(models / "theirs"))
    assert all(torch.allclose(tensor, found[name], atol=1e-6) for name, tensor in floats(read(models / "ours")).items())


@pytest.mark.parametrize(
    ("theirs", "parameters", "more", "same"),
    [
        ("sce", "", "parameters: {select_topk: 0.3, int8_mask: true}\n", "{method: sce, select_topk: 0.3}"),
        ("model_stock", "", "parameters: {filter_wise: false}\n", "{method: model_stock}"),
        ("nuslerp", "weight: 0.5", "parameters: {nuslerp_flatten: true}\n", "{method: nuslerp, weight: 0.5}"),
        ("multislerp", "weight: 0.5", "", "{method: multislerp, weight: 0.5}"),
        ("della", "weight: 0.5", "", "{method: della, density: 1.0, weight: 0.5}"),
        (
            "della_linear",
            "weight: 1, epsilon: 0.2",
            "parameters: {lambda: 0.7}\n",
            "{method: della_linear, density: 1.0, scaling: 0.7}",
        ),
        (
            "breadcrumbs",
            "weight: 1, density: 0.6, gamma: 0.1",
            "",
            "{method: breadcrumbs, density: 0.6, gamma: 0.1, scaling: 1.0}",
        ),
        ("breadcrumbs_ties", "weight: 1", "", "{method: breadcrumbs_ties, density: 1.0}"),
    ],
)
def test_mergekit_names_mean_our_methods(models: Path, theirs: str, parameters: str, more: str, same: str) -> None:
    merge_models(kit(models, theirs, parameters, more), models / "theirs")
    merge_models(ours(models, same), models / "ours")
    found = floats(read(models / "theirs"))
    assert all(torch.allclose(tensor, found[name], atol=1e-6) for name, tensor in floats(read(models / "ours")).items())


def test_mergekit_karcher_counts_every_model_it_lists(models: Path) -> None:
    entries = "".join(f"  - model: {models / name}\n" for name in ("base", "a", "b"))
    more = "parameters: {max_iter: 50, tol: 1.0e-9}\n"
    text = f"merge_method: karcher\nbase_model: {models / 'base'}\nmodels:\n{entries}{more}"
    merge_models(recipe(models, text), models / "out")
    states = [floats(tensors(seed)) for seed in (0, 1, 2)]
    for name, merged in floats(read(models / "out")).items():
        assert torch.allclose(merged, reference.karcher([state[name] for state in states]), atol=1e-6)


def test_gradients_and_filters_give_each_tensor_its_weight(models: Path) -> None:
    text = f"""
merge_method: linear
models:
  - model: {models}/a
    parameters:
      weight:
        - {{filter: norm, value: 0.25}}
        - value: [0, 1]
  - model: {models}/b
    parameters: {{weight: [1, 0]}}
parameters: {{normalize: false}}
out_dtype: bfloat16
tokenizer_source: base
"""
    merge_models(recipe(models, text), models / "out")
    a, b, merged = tensors(1), tensors(2), read(models / "out")
    assert torch.equal(merged["layers.0.w"], b["layers.0.w"].bfloat16())
    assert torch.equal(merged["layers.1.w"], a["layers.1.w"].bfloat16())
    assert torch.equal(merged["norm.weight"], (0.25 * a["norm.weight"].double() + b["norm.weight"]).bfloat16())
    assert json.loads((models / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_slerp_ends_at_its_models(models: Path) -> None:
    text = f"""
slices:
  - sources:
      - {{model: {models}/base, layer_range: [0, 2]}}
      - {{model: {models}/a, layer_range: [0, 2]}}
merge_method: slerp
base_model: {models}/base
parameters: {{t: [0, 1]}}
"""
    merge_models(recipe(models, text), models / "out")
    merged = read(models / "out")
    assert torch.equal(merged["layers.0.w"], tensors()["layers.0.w"])
    assert torch.allclose(merged["layers.1.w"], tensors(1)["layers.1.w"])


def test_depth_is_the_place_in_the_own_stack() -> None:
    found = depths(["embed", "a.layers.0.w", "a.layers.4.w", "a.layers.1.experts.7.w", "b.0.w"])
    assert list(found.values()) == [0.0, 0.0, 1.0, 0.25, 0.0]


def test_rows_beyond_the_vocabulary_are_kept(models: Path) -> None:
    for name in ("base", "a", "b"):
        (models / name / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 7}))
    merge_models(ours(models, "{method: average}"), models / "out")
    assert read(models / "out")["embed.weight"].shape == (9, 4)


@settings(max_examples=15)
@given(
    shapes=st.dictionaries(
        st.text("ab.01é", min_size=1, max_size=6),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
        min_size=1,
        max_size=4,
    ),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    shard=st.integers(8, 400),
)
def test_any_names_shapes_dtypes_and_shards_merge(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, shard: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    state = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    write(folder / "base", state)
    write(folder / "a", state, shard=shard)
    write(folder / "b", {name: tensor.float() for name, tensor in state.items()})
    merge_models(ours(folder, "{method: average}"), folder / "out")
    assert all(torch.equal(tensor, state[name]) for name, tensor in read(folder / "out").items())


# ---- memory, disk, crashes


def test_too_little_memory_says_how_much_is_needed(models: Path) -> None:
    with pytest.raises(RecipeError, match=r"--memory must be at least 450 MB here, found 1"):
        merge_models(ours(models), models / "out", memory_bytes=10**6, executor=Serial())


def test_a_value_that_is_not_finite_in_a_vector_is_named(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(models / "b", lambda state: state["norm.weight"].fill_(float("nan")))
    assert main(["merge", str(ours(models)), "--out", str(models / "out")]) == 2
    assert "'norm.weight' in" in capsys.readouterr().err
    assert not (models / "out").exists()


def test_bare_files_are_merged_too(models: Path) -> None:
    for name in ("base", "a", "b"):
        save_tensors(read(models / name), models / f"{name}.safetensors")
    path = recipe(
        models, "base: base.safetensors\nexperts: {a: a.safetensors, b: b.safetensors}\nshared: {method: average}\n"
    )
    merge_models(path, models / "out")
    found = read(models / "out")
    expected = sum(read(models / name)["layers.0.w"] for name in ("a", "b")) / 2
    assert torch.allclose(found["layers.0.w"], expected, atol=1e-6)


def test_a_full_disk_leaves_nothing(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(OSError, match="GB are needed"):
        merge_models(ours(models), models / "out")
    assert sorted(p.name for p in models.iterdir()) == ["a", "b", "base", "recipe.yaml"]


def test_an_existing_folder_is_refused_or_replaced_whole(models: Path) -> None:
    (models / "out").mkdir()
    (models / "out" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="out exists already"):
        merge_models(ours(models), models / "out")
    merge_models(ours(models), models / "out", overwrite=True)
    assert not (models / "out" / "model.safetensors.index.json").exists()
    read(models / "out")


PROGRAM = """
import os, signal, sys
from pathlib import Path
from twinmerge.merging.executor import Serial
from twinmerge.jobs.merge import merge_models
def progress(stage, done, total):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
merge_models(Path(sys.argv[1]), Path(sys.argv[2]), executor=Serial(), progress=progress)
"""


def test_a_killed_merge_is_resumed_to_the_same_bits(models: Path) -> None:
    path = ours(models, "{method: dare_linear}")
    merge_models(path, models / "calm")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), str(models / "out"), "2"], check=False, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    assert not (models / "out").exists()
    work = models / ".out.partial"
    journal = (work / JOURNAL).read_text().splitlines()
    (work / JOURNAL).write_text("\n".join(journal[:3]) + '\n["cut o')
    with (work / RESULT / "model.safetensors").open("r+b") as file:  # damage after the crash: found by its hash
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    seen: list[int] = []
    merge_models(path, models / "out", resume=True, progress=lambda stage, done, total: seen.append(done))
    assert seen[0] in (1, 2)
    names = ["model.safetensors", "config.json"]
    assert all((models / "out" / name).read_bytes() == (models / "calm" / name).read_bytes() for name in names)
    assert not work.exists()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_no_moment_of_a_kill_leaves_a_wrong_model(models: Path) -> None:
    path = ours(models, "{method: dare_linear}")
    start = time.perf_counter()
    merge_models(path, models / "calm", executor=Threads(2))
    calm, length = (models / "calm" / "model.safetensors").read_bytes(), time.perf_counter() - start
    moments, out = random.Random(0), models / "out"
    context = multiprocessing.get_context("fork")
    for _ in range(20):
        process = context.Process(
            target=merge_models, args=(path, out), kwargs={"executor": Threads(2), "resume": True}
        )
        process.start()
        time.sleep(moments.uniform(0, 1.5 * length))
        process.kill()
        process.join()
        if not out.exists():
            merge_models(path, out, resume=True)
        assert (out / "model.safetensors").read_bytes() == calm
        shutil.rmtree(out)


def test_work_of_another_recipe_is_not_resumed(models: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ours(models)), str(models / "out"), "1"], check=False, timeout=120
    )
    path = ours(models, "{method: average}")
    with pytest.raises(OutputExistsError, match="left by a run with another recipe"):
        merge_models(path, models / "out", resume=True)
    with pytest.raises(OutputExistsError, match="say --resume to go on, or --overwrite to start anew"):
        merge_models(path, models / "out")
    merge_models(path, models / "out", overwrite=True)
    assert torch.equal(read(models / "out")["ids"], torch.arange(3))


# ---- the programs


def test_plan_says_what_the_merge_needs(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("{method: average}", "{method: ties}"):
        assert main(["plan", str(ours(models, method)), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
    assert (found["tensors"], found["parameters"], found["layers"]) == (5, 88, 2)
    assert found["read_bytes"] == 3 * (88 * 4 + 24)
    assert found["chunk_entries"] == 1 << 17


def test_merge_and_plan_print_for_people(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(ours(models)), "--out", str(models / "out"), "--memory", "1GB"]) == 0
    assert "5 tensors" in capsys.readouterr().out
    assert main(["plan", str(ours(models))]) == 0
    assert "write_bytes: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan", "x.yaml", "--memory", "much"])
