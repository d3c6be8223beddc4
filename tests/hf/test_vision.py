"""Models of images: convolutions, plain and depthwise, under mixed gates."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests import tiny
from tests.tiny import GATE_ORDER, Family, random_gate
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.hf.heads import load_head
from twinmerge.hf.loading import load_backbone
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import new_manifest
from twinmerge.tensors.low_rank import LowRank
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.twin.decompose import write_weights
from twinmerge.twin.export import export_peft, export_stacked
from twinmerge.twin.features import Layers
from twinmerge.twin.manifest import write_manifest

pytestmark = pytest.mark.no_cover  # what these run is covered elsewhere, and tracing doubles their time


TRANSFORMER: Mapping[str, int] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def convnext() -> PreTrainedModel:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, image_size=16)
    model = tiny.seeded(transformers.ConvNextModel, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            elif "layer_scale" in name:
                parameter.fill_(0.5)  # 1e-6 would hide the layers
    return model


def resnet() -> PreTrainedModel:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return tiny.seeded(transformers.ResNetModel, config)


def mobilenet() -> PreTrainedModel:
    config = transformers.MobileNetV1Config(depth_multiplier=0.25, min_depth=4, tf_padding=False)
    return tiny.seeded(transformers.MobileNetV1Model, config)


def vit() -> PreTrainedModel:
    config = transformers.ViTConfig(**TRANSFORMER, intermediate_size=32, initializer_range=0.2)
    return tiny.seeded(transformers.ViTModel, config)


def dinov2() -> PreTrainedModel:
    return tiny.seeded(transformers.Dinov2Model, transformers.Dinov2Config(**TRANSFORMER, initializer_range=0.2))


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], str, int]] = {
    "convnext": (convnext, "ConvNextForImageClassification", 16),
    "resnet": (resnet, "ResNetForImageClassification", 16),
    "mobilenet": (mobilenet, "MobileNetV1ForImageClassification", 32),
    "vit": (vit, "ViTForImageClassification", 16),
    "dinov2": (dinov2, "Dinov2ForImageClassification", 16),
}
Made = tuple[Family, Path]


@pytest.fixture(scope="module", params=sorted(MODELS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A family and the weights of its twin, whole."""
    make, expert_class, _ = MODELS[request.param]
    root = tmp_path_factory.mktemp("vision") / request.param
    family = tiny.make_family(root, make(), getattr(transformers, expert_class))
    plan = family.plan(shared={"method": "average"}, exclusive={"rank": 10**4, "embeddings": "exclusive"})
    twin, work = root / "twin", root / "work"
    twin.mkdir()
    work.mkdir()
    report = write_weights(plan, twin, work)
    write_manifest(twin, new_manifest(plan, report, twin))
    return family, twin


def twin_model(folder: Path) -> TwinModel:
    artifact = TwinArtifact.open(folder)
    parts = {
        name: {key: part.to(torch.float64) for key, part in artifact.exclusive(name).items()} for name in GATE_ORDER
    }
    heads = {name: load_head(*head).double() for name in GATE_ORDER if (head := artifact.head(name))}
    return TwinModel(load_backbone(folder, dtype=torch.float64), parts, heads=heads)


def images(family: Family, rows: int) -> Tensor:
    size = MODELS[family.root.name][2]
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def expert_model(family: Family, name: str) -> Any:
    cls = getattr(transformers, MODELS[family.root.name][1])
    return cls.from_pretrained(family.root / name, dtype=torch.float64).eval()


def test_kinds_of_convolutions_are_there(made: Made) -> None:
    kinds = set(TwinArtifact.open(made[1]).kinds.values())
    assert "conv" in kinds
    assert ("grouped_conv" in kinds) == (made[0].root.name in ("convnext", "mobilenet"))


def test_gate_of_one_expert_gives_that_expert(made: Made) -> None:
    model, x = twin_model(made[1]), images(made[0], 3)
    for name in GATE_ORDER:
        with torch.no_grad():
            expected = expert_model(made[0], name)(pixel_values=x).logits
        found = torch.stack(model(pixel_values=x, expert=name).logits)
        assert torch.allclose(found, expected, atol=1e-5)  # factors are stored in float32


def test_mixed_batch_is_every_row_with_its_own_model(made: Made) -> None:
    model, x = twin_model(made[1]), images(made[0], 4)
    gate = random_gate(4, dtype=torch.float64)
    found = model(pixel_values=x, gate=gate).logits
    for row, weights in enumerate(gate):
        with torch.no_grad():
            expected = model.materialize(weights)(pixel_values=x[row : row + 1]).logits[0]
        assert torch.allclose(found[row], expected, atol=1e-10)


def test_adapter_of_convolutions_on_the_shared_expert_is_the_twin_without_the_rest(made: Made) -> None:
    from peft import PeftModel

    folder = made[1]
    artifact, x = TwinArtifact.open(folder), images(made[0], 2)
    carried = {
        name: {
            key: part.to(torch.float64)
            for key, part in artifact.exclusive(name).items()
            if artifact.kinds[key] in ("linear", "conv")
        }
        for name in GATE_ORDER
    }
    model = TwinModel(load_backbone(folder, dtype=torch.float64), carried)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about transformers
        adapted = PeftModel.from_pretrained(
            load_backbone(folder, dtype=torch.float64), folder / "experts" / "sms"
        ).eval()
    with torch.no_grad():
        found = adapted(pixel_values=x)[0]
    assert torch.allclose(found, model(pixel_values=x, expert="sms").last_hidden_state, atol=1e-10)


def test_exported_adapter_of_convolutions_is_the_expert_but_for_what_lies_beside_it(made: Made, tmp_path: Path) -> None:
    from peft import PeftModel

    artifact, x = TwinArtifact.open(made[1]), images(made[0], 2)
    held = export_peft(artifact, tmp_path, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about transformers
        adapted = PeftModel.from_pretrained(load_backbone(made[1], dtype=torch.float64), tmp_path / "sms").eval()
    carried = {
        name: {
            key: part.to(torch.float64)
            for key, part in artifact.exclusive(name).items()
            if key not in held[name]["beside"]
        }
        for name in GATE_ORDER
    }
    model = TwinModel(load_backbone(made[1], dtype=torch.float64), carried)
    with torch.no_grad():
        found = adapted(pixel_values=x)[0]
    assert torch.allclose(found, model(pixel_values=x, expert="sms").last_hidden_state, atol=1e-5)  # norms in float32
    beside = {artifact.kinds[name] for name in held["sms"]["beside"]}
    assert ("grouped_conv" in beside) == ("grouped_conv" in artifact.kinds.values())
    assert (tmp_path / "sms" / "exclusive.safetensors").exists() == bool(beside)


def test_stacked_adapter_leaves_grouped_convolutions_beside_it(made: Made, tmp_path: Path) -> None:
    artifact = TwinArtifact.open(made[1])
    stacked = export_stacked(artifact, tmp_path, tmp_path)
    grouped = [name for name, kind in artifact.kinds.items() if kind == "grouped_conv"]
    assert (tmp_path / "exclusive.safetensors").exists() or not grouped
    for name in grouped:
        beside = Checkpoint.open(tmp_path / "exclusive.safetensors")
        start, stop = stacked["columns"][name.removesuffix(".weight")]["sms"]
        part = artifact.exclusive("sms")[name]
        assert isinstance(part, LowRank)
        assert torch.equal(beside.read(f"{name}.up")[:, start:stop], part.up)
        assert torch.equal(beside.read(f"{name}.down")[start:stop], part.down)


def test_features_are_means_over_positions(made: Made) -> None:
    model, x = twin_model(made[1]), images(made[0], 2)
    states = model.encode(None, pixel_values=x, output_hidden_states=True).hidden_states
    for layer in (0, len(states) - 1):
        values = states[layer].float()
        expected = values.mean(dim=(2, 3)) if values.ndim == 4 else values.mean(dim=1)
        assert torch.allclose(model.features_as(Layers((layer,)), pixel_values=x), expected, atol=1e-6)


def test_statistics_are_each_experts_own(made: Made) -> None:
    artifact = TwinArtifact.open(made[1])
    floats = {name for name, spec in artifact.shared.specs.items() if spec.dtype.is_floating_point}
    assert not floats & {name for name, kind in artifact.kinds.items() if kind == "static"}
    if made[0].root.name in ("resnet", "mobilenet"):
        assert any("running_mean" in name for name in artifact.kinds)
        plain = twin_model(made[1]).materialize(random_gate(1, dtype=torch.float64)[0])
        assert all(buffer.dtype != torch.float32 for buffer in plain.buffers())


def test_shared_statistics_are_the_mean_of_the_experts_and_all_else_is_each_experts_own(tmp_path: Path) -> None:
    make, expert_class, size = MODELS["resnet"]
    family = tiny.make_family(tmp_path / "resnet", make(), getattr(transformers, expert_class))
    plan = family.plan(shared={"method": "average"}, exclusive={"rank": 10**4, "bn": "shared"})
    assert not any(task.exclusive for task in plan.tasks if task.name.endswith(("running_mean", "running_var")))
    twin, work = tmp_path / "twin", tmp_path / "work"
    twin.mkdir()
    work.mkdir()
    write_manifest(twin, new_manifest(plan, write_weights(plan, twin, work), twin))
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    experts = {name: expert_model(family, name) for name in GATE_ORDER}
    expected: Any = experts["sms"]
    with torch.no_grad():
        for name, buffer in expected.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.stack([one.get_buffer(name) for one in experts.values()]).mean(dim=0))
        found = torch.stack(twin_model(twin)(pixel_values=x, expert="sms").logits)
        assert torch.allclose(found, expected(pixel_values=x).logits, atol=1e-5)


def test_statistics_are_stored_as_they_are_and_a_small_variance_survives_large_ones(tmp_path: Path) -> None:
    make, expert_class, _ = MODELS["resnet"]
    family = tiny.make_family(tmp_path / "resnet", make(), getattr(transformers, expert_class))
    for factor, name in zip((3e3, 2e3, 1e-2), ("ag", "sms", "trec"), strict=True):
        expert = getattr(transformers, expert_class).from_pretrained(family.root / name)
        for module in expert.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_var.fill_(factor)
        expert.save_pretrained(family.root / name)
    plan = family.plan(shared={"method": "average"}, exclusive={"budget": 20.0})
    dtypes = {task.name.rpartition(".")[2]: plan.stored_dtype(task) for task in plan.tasks if task.kind == "vector"}
    assert dtypes == {
        "weight": torch.float16,
        "bias": torch.float16,
        "running_mean": torch.float32,
        "running_var": torch.float32,
    }
    twin, work = tmp_path / "twin", tmp_path / "work"
    twin.mkdir()
    work.mkdir()
    write_manifest(twin, new_manifest(plan, write_weights(plan, twin, work), twin))
    model = twin_model(twin)
    gate = torch.tensor([float(name == "trec") for name in GATE_ORDER], dtype=torch.float64)
    for name, buffer in model.materialize(gate).named_buffers():
        if name.endswith("running_var"):
            assert torch.allclose(buffer, torch.full_like(buffer, 1e-2), rtol=1e-2)  # float32 at 1,700


def test_class_that_transformers_renames_on_loading_is_written_by_its_parameters_names(tmp_path: Path) -> None:
    found = tiny.make_family(tmp_path, vit(), transformers.ViTForImageClassification)
    stored, plan = Checkpoint.open(found.base), found.plan()
    names = {task.name for task in plan.tasks}
    assert "encoder.layer.0.attention.attention.query.weight" in stored.specs
    assert names == set(vit().state_dict())
    assert plan.experts["sms"].stored["layers.0.attention.q_proj.weight"] == "vit.layers.0.attention.q_proj.weight"
    assert torch.equal(
        plan.base.read("layers.0.attention.q_proj.weight"),
        stored.read("encoder.layer.0.attention.attention.query.weight"),
    )
