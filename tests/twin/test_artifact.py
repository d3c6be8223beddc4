"""The twin's folder: what is written is read back to the bit, bytes are those on disk, damage is named."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twinmerge.errors import ArtifactError
from twinmerge.files.hashes import sha256_of
from twinmerge.files.writer import save_tensors
from twinmerge.routing.combined import assemble
from twinmerge.routing.store import load_router, save_router
from twinmerge.tensors.low_rank import LowRank
from twinmerge.tensors.parts import Dense, Part
from twinmerge.tensors.sparse import Sparse
from twinmerge.twin.artifact import TwinArtifact, write_exclusive
from twinmerge.twin.manifest import Manifest, write_manifest
from twinmerge.twin.plan import Kind
from twinmerge.twin.recipe import RouterSettings

KINDS: dict[str, Kind] = {
    "layer.query.weight": "linear",
    "layer.query.bias": "vector",
    "layer.mlp.weight": "conv1d",
    "layer.words.weight": "embedding",
    "layer.image.weight": "conv",
    "layer.sound.weight": "conv",
    "layer.depth.weight": "grouped_conv",
    "layer.norm.weight": "vector",
    "layer.values": "vector",
}
SHAPES: dict[str, tuple[int, ...]] = {
    "layer.query.weight": (4, 3),
    "layer.query.bias": (4,),
    "layer.mlp.weight": (3, 5),
    "layer.words.weight": (6, 2),
    "layer.image.weight": (4, 2, 3, 3),
    "layer.sound.weight": (4, 2, 3),
    "layer.depth.weight": (4, 1, 3, 3),
    "layer.norm.weight": (5,),
    "layer.values": (2,),
}


def matrix_shape(name: str) -> tuple[int, int]:
    out, *rest = SHAPES[name]
    return out, int(torch.tensor(rest).prod())


def counted(*shape: int) -> Tensor:
    """0, 1, 2, ... as float32."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def part_of(name: str, form: str) -> Part:
    if KINDS[name] == "vector":
        return Dense(counted(*SHAPES[name]) + 1)
    out, columns = matrix_shape(name)
    if form == "sparse":
        return Sparse(torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0.5, -2.0]), (out, columns))
    rank = int(form)
    return LowRank(counted(out, rank), counted(rank, columns) - 1)


def make_twin(folder: Path, experts: Mapping[str, Mapping[str, Part]]) -> Path:
    """A whole artifact, of the tensors above."""
    folder.mkdir()
    save_tensors({name: torch.zeros(shape) for name, shape in SHAPES.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}\n")
    for expert, parts in experts.items():
        write_exclusive(folder / "experts" / expert, parts, KINDS, SHAPES)
        (folder / "experts" / expert / "head").mkdir()
        save_tensors({"classifier.weight": counted(2, 3)}, folder / "experts" / expert / "head" / "model.safetensors")
        (folder / "experts" / expert / "head" / "config.json").write_text('{"id2label": {"0": "no", "1": "yes"}}')
    settings = RouterSettings(method="centroid", features="all")
    save_router(assemble(list(experts), settings, feature_size=3), folder / "router")
    write_manifest(folder, manifest_of(experts))
    return folder


def manifest_of(experts: Collection[str]) -> Manifest:
    """All that a twin of these experts must say."""
    source = {"source": "models/x", "bytes": 4, "adapter": False, "energy": 1.0, "energy_kept": 0.5}
    return Manifest.model_validate(
        {
            "created": "2026-01-01T00:00:00+00:00",
            "recipe": {
                "base": "base",
                "experts": {name: {"model": name, "router_data": f"{name}.jsonl"} for name in experts},
                "shared": {"method": "average"},
                "exclusive": {"rank": 2},
                "router": {"method": "centroid", "features": "all"},
            },
            "versions": {"twinmerge": "0.1.0"},
            "base": {"source": "someone/base", "bytes": 4},
            "experts": {name: {**source, "rank_mean": 2.0, "rank_max": 2} for name in sorted(experts)},
            "tensors": {name: {"kind": kind, "ranks": dict.fromkeys(experts, 2)} for name, kind in KINDS.items()},
            "router": {"accuracy": 1.0, "calibration_error": 0.0, "temperature": 1.0, "inputs_per_expert": 9},
        }
    )


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    return make_twin(tmp_path / "twin", {e: {name: part_of(name, "2") for name in KINDS} for e in ("ag", "sms")})


def same(first: Part, second: Part) -> bool:
    ours, theirs = first.pack(), second.pack()
    return (
        type(first) is type(second)
        and first.shape == second.shape
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[leaf], theirs[leaf]) for leaf in ours)
    )


# ---- save and load to the bit


@given(st.dictionaries(st.sampled_from(sorted(KINDS)), st.sampled_from(["1", "2", "sparse"])))
@settings(max_examples=15)
def test_exclusive_knowledge_is_read_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, forms: dict[str, str]
) -> None:
    parts = {name: part_of(name, form) for name, form in forms.items()}
    folder = make_twin(tmp_path_factory.mktemp("artifact") / "twin", {"sms": parts})
    found = TwinArtifact.open(folder).exclusive("sms")
    assert found.keys() == parts.keys()
    assert all(same(found[name], part) for name, part in parts.items())


def test_rank_zero_is_left_out_and_a_twin_without_matrices_has_no_adapter(tmp_path: Path) -> None:
    folder = make_twin(tmp_path / "twin", {"sms": {name: part_of(name, "0") for name in KINDS}})
    assert TwinArtifact.open(folder).exclusive("sms").keys() == {n for n, kind in KINDS.items() if kind == "vector"}
    assert sorted(path.name for path in (folder / "experts" / "sms").iterdir()) == ["exclusive.safetensors", "head"]


def test_expert_without_exclusive_knowledge_is_the_shared_expert(tmp_path: Path) -> None:
    assert TwinArtifact.open(make_twin(tmp_path / "twin", {"sms": {}})).exclusive("sms") == {}


def test_every_dtype_survives(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        part = LowRank(counted(4, 2), counted(2, 3)).to(dtype)
        folder = make_twin(tmp_path / str(dtype), {"sms": {"layer.query.weight": part}})
        assert same(TwinArtifact.open(folder).exclusive("sms")["layer.query.weight"], part)


def test_names_and_kinds_are_those_of_the_manifest(twin: Path) -> None:
    artifact = TwinArtifact.open(str(twin))
    assert artifact.expert_names == ("ag", "sms")
    assert artifact.kinds == KINDS
    assert load_router(artifact.path / "router").expert_names == ("ag", "sms")
    assert torch.equal(artifact.shared.read("layer.values"), torch.zeros(2))


def test_head_is_read_with_its_config(twin: Path) -> None:
    head = TwinArtifact.open(twin).head("sms")
    assert head is not None
    assert head[0] == {"id2label": {"0": "no", "1": "yes"}}
    assert torch.equal(head[1]["classifier.weight"], counted(2, 3))


def test_golden_bytes_of_an_expert(twin: Path) -> None:
    """Another hash here is another format: count up FORMAT_VERSION."""
    files = [path for path in sorted((twin / "experts" / "sms").iterdir()) if path.is_file()]
    assert {path.name: sha256_of(path)[:16] for path in files} == {
        "adapter_config.json": "35ac1f78857f30ca",
        "adapter_model.safetensors": "18afbace2fb7448a",
        "exclusive.safetensors": "511f93e357070b09",
    }


def test_adapter_config_gives_every_pair_scale_one(tmp_path: Path) -> None:
    parts = {
        "layer.query.weight": part_of("layer.query.weight", "2"),
        "layer.mlp.weight": part_of("layer.mlp.weight", "1"),
    }
    folder = make_twin(tmp_path / "twin", {"sms": parts})
    config = json.loads((folder / "experts" / "sms" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (2, 2, True)
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"layer\.mlp": 1}
    assert config["target_modules"] == ["layer.mlp", "layer.query"]


# ---- bytes


def test_bytes_reported_are_the_bytes_on_disk(twin: Path) -> None:
    parts = TwinArtifact.open(twin).bytes_per_part()
    on_disk = {path.relative_to(twin).as_posix(): path.stat().st_size for path in twin.rglob("*") if path.is_file()}
    assert sum(parts.values()) == sum(on_disk.values())
    heads = sum(size for name, size in on_disk.items() if "/head/" in name)
    assert parts["exclusive"] == sum(size for name, size in on_disk.items() if name.startswith("experts/")) - heads
    assert parts["shared"] == on_disk["model.safetensors"]
    assert parts["other"] == on_disk["config.json"] + on_disk["twin.json"]
    assert parts["heads"] == heads > 0
    assert parts["router"] == sum(size for name, size in on_disk.items() if name.startswith("router/")) > 0
    own = TwinArtifact.open(twin).bytes_per_expert()
    assert tuple(own) == TwinArtifact.open(twin).expert_names
    assert {key: sum(sizes[key] for sizes in own.values()) for key in ("exclusive", "heads")} == {
        key: parts[key] for key in ("exclusive", "heads")
    }


# ---- damage


def test_whole_twin_is_verified(twin: Path) -> None:
    assert TwinArtifact.open(twin).verify() == 14


@pytest.mark.parametrize("name", ["model.safetensors", "experts/sms/adapter_config.json", "config.json"])
def test_flipped_byte_is_found_by_verify(twin: Path, name: str) -> None:
    content = bytearray((twin / name).read_bytes())
    content[len(content) // 2] ^= 1
    (twin / name).write_bytes(content)
    artifact = TwinArtifact.open(twin)  # sizes are right
    with pytest.raises(ArtifactError, match=rf"{name} changed: sha256 must be [0-9a-f]{{16}}…, found [0-9a-f]{{16}}…"):
        artifact.verify()


def test_file_that_does_not_belong_is_found_by_verify(twin: Path) -> None:
    (twin / "experts" / "sms" / "notes.txt").write_text("x")
    with pytest.raises(ArtifactError, match=r"experts/sms/notes\.txt is not part of the twin; remove it"):
        TwinArtifact.open(twin).verify()


def cut(twin: Path) -> None:
    path = twin / "experts/sms/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda t: (t / "model.safetensors").unlink(),
            r"model\.safetensors must hold [\d,]+ bytes, found no file; copy",
        ),
        (cut, r"adapter_model\.safetensors must hold [\d,]+ bytes, found [\d,]+; copy or build the twin again"),
    ],
)
def test_damaged_twin_is_named_when_it_is_opened(twin: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(twin)
    with pytest.raises(ArtifactError, match=message) as caught:
        TwinArtifact.open(twin)
    assert ("\n" in str(caught.value), caught.value.exit_code) == (False, 2)
