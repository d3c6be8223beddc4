"""Models of images from folders to answers: built, checked, asked and exported as a user does it."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests import tiny
from tests.hf.test_vision import TRANSFORMER, convnext, dinov2, resnet, vit
from tests.tiny import EXPERTS, GATE_ORDER, Family
from twinmerge.cli import main
from twinmerge.errors import DataError, InputError
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import build
from twinmerge.jobs.predict import predict

pytestmark = pytest.mark.no_cover  # what these run is covered elsewhere, and tracing doubles their time


def clip() -> transformers.PreTrainedModel:
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        initializer_factor=4.0,
    )  # fmt: skip
    return tiny.seeded(transformers.CLIPVisionModel, config)


def siglip() -> transformers.PreTrainedModel:
    config = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    return tiny.seeded(transformers.SiglipVisionModel, config)


def deit() -> transformers.PreTrainedModel:
    config = transformers.DeiTConfig(**TRANSFORMER, intermediate_size=32, initializer_range=0.2)
    return tiny.seeded(transformers.DeiTModel, config)


def swin() -> transformers.PreTrainedModel:
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=4, initializer_range=0.2
    )
    return tiny.seeded(transformers.SwinModel, config)


MODELS: dict[str, tuple[Callable[[], transformers.PreTrainedModel], str]] = {
    "vit": (vit, "ViTForImageClassification"),
    "dinov2": (dinov2, "Dinov2ForImageClassification"),
    "convnext": (convnext, "ConvNextForImageClassification"),
    "resnet": (resnet, "ResNetForImageClassification"),
    "clip": (clip, "CLIPVisionModel"),
    "siglip": (siglip, "SiglipVisionModel"),
    "deit": (deit, "DeiTForImageClassification"),
    "swin": (swin, "SwinForImageClassification"),
}


def picture(expert: str, number: int) -> Image.Image:
    """Noise in the colour of one expert."""
    values = np.random.default_rng([EXPERTS.index(expert), number]).integers(0, 120, (20, 24, 3))
    values[..., EXPERTS.index(expert)] += 130
    return Image.fromarray(values.astype(np.uint8))


def make(root: Path, name: str) -> Family:
    """A base, its experts, and pictures that belong to them."""
    base, cls = MODELS[name]
    family = tiny.make_family(root, base(), getattr(transformers, cls))
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(family.base)
    for file in family.base.glob("*token*"):
        file.unlink()
    (root / "pictures").mkdir()
    for expert in EXPERTS:
        paths = [f"pictures/{expert}{number}.png" for number in range(12)]
        for number, path in enumerate(paths):
            picture(expert, number).save(root / path)
        (root / f"{expert}.jsonl").write_text("".join(json.dumps({"image": path}) + "\n" for path in paths))
    return family


@pytest.fixture(scope="module", params=sorted(MODELS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path]:
    root = tmp_path_factory.mktemp(request.param)
    family = make(root, request.param)
    recipe = family.recipe(exclusive={"rank": 10**4, "embeddings": "exclusive"}, router={"samples_per_expert": 12})
    return family, build(recipe, root / "twin").path


def test_answers_are_those_of_each_expert_as_its_own_class_gives_them(made: tuple[Family, Path]) -> None:
    family, twin = made
    model = TwinModel.from_pretrained(twin)
    cls: Any = getattr(transformers, MODELS[family.root.name[:-1]][1])
    processor = transformers.AutoImageProcessor.from_pretrained(family.base)
    for name in GATE_ORDER:
        sources = [str(family.root / f"pictures/{name}{number}.png") for number in range(3)]
        expert = cls.from_pretrained(family.root / name).eval()
        pixels = processor(images=[Image.open(path) for path in sources], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            out = expert(pixel_values=pixels)
        answers = list(predict(model, [{"image": path} for path in sources], expert=name))
        for index, answer in enumerate(answers):
            if "logits" in out:
                scores = out.logits[index].softmax(dim=0)
                assert answer["label"] == f"LABEL_{int(scores.argmax())}"
                assert answer["score"] == pytest.approx(float(scores.max()), abs=1e-4)
            else:
                assert torch.allclose(torch.tensor(answer["embedding"]), out.pooler_output[index], atol=1e-4)


def test_exported_expert_answers_in_its_own_class_of_plain_transformers(made: tuple[Family, Path]) -> None:
    family, twin = made
    out = family.root / "exported"
    assert main(["export", str(twin), "--to", "dense", "--expert", "sms", "--out", str(out)]) == 0
    cls: Any = getattr(transformers, MODELS[family.root.name[:-1]][1])
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (
            cls.from_pretrained(folder).eval()(pixel_values=pixels) for folder in (out, family.root / "sms")
        )
    name = "logits" if "logits" in expected else "pooler_output"
    assert torch.allclose(found[name], expected[name], atol=1e-4)


def test_pictures_are_routed_each_by_itself(made: tuple[Family, Path]) -> None:
    family, twin = made
    model = TwinModel.from_pretrained(twin)
    rows = [{"image": str(family.root / f"pictures/{name}{i}.png"), "id": i} for i in range(4) for name in GATE_ORDER]
    together = list(predict(model, rows))
    assert [answer["id"] for answer in together] == [row["id"] for row in rows]
    right = [answer["expert"] == name for answer, name in zip(together, GATE_ORDER * 4, strict=True)]
    assert sum(right) >= 11
    for row, answer in zip(rows[:3], together[:3], strict=True):
        (alone,) = predict(model, [row])
        assert alone["gate"] == pytest.approx(answer["gate"], abs=1e-4)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path]:
    root = tmp_path_factory.mktemp("one")
    family = make(root, "vit")
    (root / "recipe.yaml").write_text(
        "base: base\nexperts:\n"
        + "".join(f"  {name}: {{model: {name}, router_data: {name}.jsonl}}\n" for name in EXPERTS)
        + "exclusive: {budget: 2}\n"
    )
    assert main(["build", str(root / "recipe.yaml"), "--out", str(root / "twin")]) == 0
    return family, root / "twin"


def test_path_bytes_and_data_uri_are_the_same_picture(one: tuple[Family, Path]) -> None:
    family, twin = one
    path = family.root / "pictures/sms0.png"
    content = path.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    model = TwinModel.from_pretrained(twin)
    answers = list(predict(model, [{"image": source} for source in (str(path), content, uri)]))
    for answer in answers:
        answer.pop("image")
    assert answers[0] == answers[1] == answers[2]


def test_program_answers_a_file_whose_paths_start_from_its_folder(
    one: tuple[Family, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    family, twin = one
    out = family.root / "answers.jsonl"
    assert main(["predict", str(twin), "--input", str(family.root / "sms.jsonl"), "--output", str(out)]) == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(answers) == 12
    assert Path(answers[0]["image"]) == family.root / "pictures/sms0.png"
    assert "12 rows" in capsys.readouterr().out


def test_exported_model_loads_in_plain_transformers(one: tuple[Family, Path]) -> None:
    family, twin = one
    out = family.root / "exported"
    assert main(["export", str(twin), "--to", "dense", "--expert", "sms", "--out", str(out)]) == 0
    plain = transformers.pipeline("image-classification", model=str(out))
    (answer,) = predict(
        TwinModel.from_pretrained(twin), [{"image": str(family.root / "pictures/sms1.png")}], expert="sms"
    )
    best = plain(str(family.root / "pictures/sms1.png"))[0]
    assert best["label"] == answer["label"]
    assert best["score"] == pytest.approx(answer["score"], abs=1e-4)


def damaged(family: Family) -> list[dict[str, Any]]:
    whole = (family.root / "pictures/sms0.png").read_bytes()
    (family.root / "cut.png").write_bytes(whole[: len(whole) // 2])
    (family.root / "text.png").write_text("no picture")
    return [
        {"image": str(family.root / "pictures/sms0.png")},
        {"image": str(family.root / "cut.png")},
        {"image": str(family.root / "text.png")},
        {"image": str(family.root / "absent.png")},
        {"image": "data:image/png;base64,AAAA"},
        {"image": "data:image/png,AAAA"},
    ]


def test_damaged_pictures_are_refused_by_name(one: tuple[Family, Path]) -> None:
    family, twin = one
    model = TwinModel.from_pretrained(twin)
    for row in damaged(family)[1:]:
        with pytest.raises(DataError, match=r"cut.png cannot be read|text.png cannot be read|absent.png|data:image"):
            list(predict(model, [row]))
    with pytest.raises(DataError, match="row 1: this twin reads images; the row lacks 'image'"):
        list(predict(model, [{"text": "w5"}]))


def test_damaged_pictures_are_skipped_if_asked(one: tuple[Family, Path], capsys: pytest.CaptureFixture[str]) -> None:
    family, twin = one
    rows = family.root / "damaged.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in damaged(family)))
    command = ["predict", str(twin), "--input", str(rows), "--output", str(family.root / "damaged-out.jsonl")]
    assert main([*command, "--skip-unreadable"]) == 0
    answers = [json.loads(line) for line in (family.root / "damaged-out.jsonl").read_text().splitlines()]
    assert "error" not in answers[0]
    assert answers[0]["label"]
    assert all(answer["error"] and "label" not in answer for answer in answers[1:])
    assert "5 unreadable" in capsys.readouterr().out


def test_router_data_with_a_damaged_picture_are_refused_before_any_work(tmp_path: Path) -> None:
    family = make(tmp_path / "family", "vit")
    (family.root / "pictures/ag3.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"experts.ag.router_data: row 4: image .*ag3.png cannot be read"):
        build(family.recipe(exclusive={"rank": 1}), tmp_path / "twin")
    assert not (tmp_path / "twin").exists()


def test_base_without_a_processor_and_urls_are_refused(tmp_path: Path) -> None:
    family = make(tmp_path / "family", "vit")
    (family.base / "preprocessor_config.json").rename(tmp_path / "kept")
    with pytest.raises(InputError, match=r"has no preprocessor_config.json"):
        build(family.recipe(exclusive={"rank": 1}), tmp_path / "twin")
    (tmp_path / "kept").rename(family.base / "preprocessor_config.json")
    (family.root / "ag.jsonl").write_text('{"image": "https://example.org/a.png"}\n' * 2)
    with pytest.raises(InputError, match="nothing is fetched"):
        build(family.recipe(exclusive={"rank": 1}), tmp_path / "twin")


def test_expert_prepares_its_images_its_own_way(tmp_path: Path) -> None:
    family = make(tmp_path / "family", "vit")
    other = transformers.ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3])
    other.save_pretrained(family.root / "sms")
    twin = build(family.recipe(exclusive={"rank": 10**4, "embeddings": "exclusive"}), tmp_path / "twin").path
    source = str(family.root / "pictures/sms0.png")
    (answer,) = predict(TwinModel.from_pretrained(twin), [{"image": source}], expert="sms")
    expert: Any = transformers.ViTForImageClassification.from_pretrained(family.root / "sms").eval()
    with torch.no_grad():
        scores = expert(**other(images=Image.open(source), return_tensors="pt")).logits[0].softmax(dim=0)
    assert answer["score"] == pytest.approx(float(scores.max()), abs=1e-4)
    assert answer["label"] == f"LABEL_{int(scores.argmax())}"


def test_picture_is_turned_as_its_camera_says(one: tuple[Family, Path]) -> None:
    from twinmerge.hf.images import open_image

    tags = Image.Exif()
    tags[0x0112] = 6
    content = io.BytesIO()
    picture("ag", 0).save(content, "jpeg", exif=tags)
    assert open_image(content.getvalue()).size == (20, 24)
    assert open_image(content.getvalue(), channels=1).mode == "L"
