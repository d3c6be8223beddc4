"""Static merges of folders of many kinds, named as their libraries name them: every tensor is there and the mean."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny
from twinmerge.cli import main

SIDES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {**SIDES, "image_size": 16, "patch_size": 8}


def clip() -> Any:
    text = {**SIDES, "intermediate_size": 32, "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 16}
    return transformers.CLIPConfig(text_config=text, vision_config={**IMAGE, "intermediate_size": 32}, projection_dim=8)


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return transformers.T5Config(vocab_size=tiny.VOCABULARY, decoder_start_token_id=0, **sizes)


CLASSES: dict[str, Callable[[], Any]] = {
    "ViTForImageClassification": lambda: transformers.ViTConfig(**IMAGE, intermediate_size=32),
    "Dinov2ForImageClassification": lambda: transformers.Dinov2Config(**IMAGE),
    "CLIPModel": clip,
    "T5ForConditionalGeneration": t5,
    "BertForSequenceClassification": lambda: tiny.text_config(transformers.BertConfig),
    "MixtralForCausalLM": lambda: tiny.text_config(
        transformers.MixtralConfig, num_key_value_heads=1, num_local_experts=2
    ),
}


def merge(root: Path, method: str = "average") -> Path:
    (root / "r.yaml").write_text(f"base: base\nexperts: {{a: a, b: b}}\nshared: {{method: {method}}}\n")
    assert main(["merge", str(root / "r.yaml"), "--out", str(root / "out")]) == 0
    return root / "out"


def read(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def require_mean(root: Path) -> None:
    base, a, b, out = (read(root / name) for name in ("base", "a", "b", "out"))
    assert base.keys() == out.keys()
    for name, tensor in out.items():
        expected = (a[name].double() + b[name].double()) / 2 if tensor.is_floating_point() else base[name]
        assert torch.allclose(tensor.double(), expected.double(), atol=1e-6), name
        assert not tensor.is_floating_point() or not torch.equal(tensor, base[name])


@pytest.mark.parametrize("name", CLASSES)
def test_every_tensor_of_a_transformers_folder_is_merged_and_the_folder_loads(tmp_path: Path, name: str) -> None:
    cls = getattr(transformers, name)
    model = tiny.seeded(cls, CLASSES[name]())
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    for expert in ("a", "b"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / expert)
    out = merge(tmp_path)
    require_mean(tmp_path)
    _, info = cls.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())


def state(seed: int) -> dict[str, Tensor]:
    """A small convolutional network, as timm names its tensors; seeds above 0 are fine-tunes of 0."""
    shapes = {"conv1.weight": (4, 3, 3, 3), "layer1.0.conv1.weight": (4, 4, 3, 3), "layer1.0.bn1.weight": (4,)}
    made = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in shapes.items()}
    noise = torch.Generator().manual_seed(seed)
    if seed:
        made = {name: t + 0.05 * torch.randn(t.shape, generator=noise) for name, t in made.items()}
    return {**made, "bn1.num_batches_tracked": torch.tensor(3)}


FOLDERS = {
    "timm": ("model", {"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": {"input_size": [3, 32, 32]}}),
    "diffusers": ("diffusion_pytorch_model", {"_class_name": "UNet2DModel", "_diffusers_version": "0.30.0"}),
    "bare": ("weights", None),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_of_other_libraries_keep_their_names(tmp_path: Path, kind: str) -> None:
    stem, config = FOLDERS[kind]
    for seed, name in enumerate(("base", "a", "b")):
        (tmp_path / name).mkdir()
        save_file(state(seed), tmp_path / name / f"{stem}.safetensors")
        if config:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
    out = merge(tmp_path)
    require_mean(tmp_path)
    expected = {f"{stem}.safetensors", "merge.json"} | ({"config.json"} if config else set())
    assert {path.name for path in out.iterdir()} == expected
