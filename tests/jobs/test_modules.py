"""Twins of plain torch modules: from state dicts to answers, each row as its own merged module gives it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import twinmerge as tm
from tests.tiny import random_gate
from twinmerge.cli import main
from twinmerge.errors import (
    ArtifactError,
    CheckpointError,
    DataError,
    GateError,
    InputError,
    MismatchError,
    RecipeError,
)
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.modules import build_from_state_dicts
from twinmerge.runtime.wrapped import wrap

CLASSES = {"cats": 3, "dogs": 5, "mice": 2}
NAMES = tuple(sorted(CLASSES))


class Net(nn.Module):
    """Convolutions with BatchNorm, a parameter that no layer holds, and a head."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        hidden = self.pool(self.deep(self.stem(x)) * self.scale).flatten(1)
        return self.head(hidden if shift is None else hidden + shift)


def seeded(classes: int = 4) -> Net:
    torch.manual_seed(0)
    net = Net(classes).eval()
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
    return net


def expert(name: str, classes: int | None = None) -> dict[str, Tensor]:
    """The base, moved; with a head of its own, if that is asked for."""
    generator = torch.Generator().manual_seed(NAMES.index(name) + 1)
    state = seeded().state_dict()
    moved = {
        k: v + 0.05 * torch.randn(v.shape, generator=generator) if v.is_floating_point() else v
        for k, v in state.items()
    }
    if classes is not None:
        moved["head.weight"] = torch.randn(classes, 8, generator=generator)
        moved["head.bias"] = torch.randn(classes, generator=generator)
    return moved


def images(name: str, count: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(NAMES.index(name) + 10)
    found = torch.rand(count, 3, 6, 6, generator=generator)
    found[:, NAMES.index(name)] += 4
    return found


WHOLE = {"rank": 10**4}


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts with heads of their own, and a router on the pooled features."""
    out = tmp_path_factory.mktemp("twin") / "twin"
    build_from_state_dicts(
        seeded(),
        {name: expert(name, classes) for name, classes in CLASSES.items()},
        out,
        inputs=images("cats", 4),
        heads=("head",),
        router_inputs={name: images(name) for name in NAMES},
        features="pool",
        exclusive=WHOLE,
    )
    return out


def plain(state: dict[str, Tensor], x: Tensor, **more: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.func.functional_call(seeded(), state, (x,), more)


def test_each_row_is_answered_by_its_own_merged_module(twin: Path) -> None:
    model, gate = wrap(seeded(), twin), random_gate(6)
    x = torch.cat([images(name, 2) for name in NAMES])
    out = model(x, gate=gate)
    for row in range(6):
        alone = plain(model.state_for(gate[row]), x[row : row + 1])[0]
        assert torch.allclose(out.outputs[row], alone, atol=1e-5)


def test_gate_of_one_expert_is_that_expert_with_its_head(twin: Path) -> None:
    model = wrap(seeded(), twin)
    for name, classes in CLASSES.items():
        found = torch.stack(model(images(name, 3), expert=name).outputs)
        assert found.shape == (3, classes)
        assert torch.allclose(found, plain(expert(name, classes), images(name, 3)), atol=1e-4)


def test_rows_find_their_experts(twin: Path) -> None:
    x = torch.cat([images(name, 4) for name in NAMES])
    out = wrap(seeded(), twin)(x)
    right = [found == name for found, name in zip(out.expert, [n for n in NAMES for _ in range(4)], strict=True)]
    assert sum(right) >= 11
    assert out.probability is not None
    assert out.probability.shape == (12, 3)
    alone = wrap(seeded(), twin)(x[5:6])
    assert torch.allclose(alone.gate[0], out.gate[5], atol=1e-4)
    assert torch.allclose(alone.outputs[0], out.outputs[5], atol=1e-4)


def test_more_inputs_by_name(twin: Path) -> None:
    model, gate, x = wrap(seeded(), twin), random_gate(3), images("cats", 3)
    shift = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    out = model(x, shift=shift, gate=gate)
    for row in range(3):
        alone = plain(model.state_for(gate[row]), x[row : row + 1], shift=shift[row : row + 1])[0]
        assert torch.allclose(out.outputs[row], alone, atol=1e-5)


def test_layers_are_fast_where_there_is_a_form_and_exact_elsewhere(twin: Path) -> None:
    ways = wrap(seeded(), twin).paths()
    assert ways["stem.0.weight"] == "fast"
    assert ways["scale"] == "fallback"


def test_a_module_that_is_wrapped_is_not_touched(twin: Path) -> None:
    module = seeded()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    wrap(module, twin)(images("cats", 2))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_without_heads_the_whole_module_is_shared(tmp_path: Path) -> None:
    twin = tm.build_from_state_dicts(
        seeded(), {name: expert(name) for name in NAMES}, tmp_path / "twin", inputs={"x": images("cats", 4)},
        exclusive=WHOLE,
    )  # fmt: skip
    assert twin.manifest.router is None
    model, gate, x = tm.wrap(seeded(), tmp_path / "twin"), random_gate(4), images("dogs", 4)
    out = model(x, gate=gate)
    assert out.outputs.shape == (4, 4)
    for row in range(4):
        assert torch.allclose(out.outputs[row], plain(model.state_for(gate[row]), x[row : row + 1])[0], atol=1e-5)
    with pytest.raises(GateError, match="no router; give a gate or an expert"):
        model(x)
    with pytest.raises(GateError, match="unknown expert 'cows'"):
        model(x, expert="cows")
    with pytest.raises(GateError, match="one expert or one a row"):
        model(x, expert=["cats"])
    with pytest.raises(GateError, match="no router"):
        model.features(x)


def test_budget_compresses_and_says_how_much_is_kept(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"exclusive": {"budget": 8}, "inputs": images("cats", 4)}
    twin = build_from_state_dicts(seeded(), {n: expert(n) for n in NAMES}, tmp_path / "twin", **settings)
    assert all(0 < entry.energy_kept < 1 for entry in twin.manifest.experts.values())


@pytest.mark.parametrize("form", ["safetensors", "folder", "torch", "lightning", "parallel"])
def test_state_dicts_may_lie_in_files(tmp_path: Path, form: str) -> None:
    sources: dict[str, Path] = {}
    for name in ("base", *NAMES):
        state = seeded().state_dict() if name == "base" else expert(name)
        if form in ("safetensors", "folder"):
            sources[name] = tmp_path / name / "model.safetensors"
            sources[name].parent.mkdir()
            save_file({k: v.contiguous() for k, v in state.items()}, sources[name])
            sources[name] = sources[name].parent if form == "folder" else sources[name]
        else:
            sources[name] = tmp_path / f"{name}.pt"
            named = {f"module.{k}": v for k, v in state.items()} if form == "parallel" else state
            torch.save({"state_dict": named, "epoch": 3} if form == "lightning" else named, sources[name])
    base = sources.pop("base")
    build_from_state_dicts(seeded(), sources, tmp_path / "twin", base=base, inputs=images("cats", 4), exclusive=WHOLE)
    found = wrap(seeded(), tmp_path / "twin")(images("dogs", 2), expert="dogs").outputs
    assert torch.allclose(found, plain(expert("dogs"), images("dogs", 2)), atol=1e-4)


def test_folder_is_shown_and_verified_and_says_what_it_is(twin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(twin)]) == 0
    assert "cats" in capsys.readouterr().out
    assert main(["verify", str(twin)]) == 0
    assert "twinmerge.wrap(module, folder)" in (twin / "README.md").read_text()
    words = "is a twin of a plain torch module, of which a folder holds the weights alone"
    with pytest.raises(InputError, match=words):
        TwinModel.from_pretrained(twin)
    (twin.parent / "rows.jsonl").write_text('{"text": "w5"}\n')
    for command in (
        ["predict", str(twin), "--input", str(twin.parent / "rows.jsonl"), "--output", str(twin.parent / "out.jsonl")],
        ["export", str(twin), "--to", "dense", "--expert", "cats", "--out", str(twin.parent / "dense")],
        ["remove", str(twin), "--expert", "cats"],
    ):
        assert main(command) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(ArtifactError, match="is a twin of another module: 'head.weight'|'0.weight'"):
        wrap(nn.Sequential(nn.Linear(2, 2)), twin)


class Code:
    def __reduce__(self) -> Any:
        return print, ("run",)


def refused(**changes: Any) -> dict[str, Any]:
    good: dict[str, Any] = {"experts": {n: expert(n) for n in NAMES}, "inputs": images("cats", 4), "exclusive": WHOLE}
    return {**good, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"experts": {"cats": expert("cats")}}, RecipeError, "at least two experts, found 1"),
        (
            {"experts": {"cats": expert("cats", 3), "dogs": expert("dogs")}},
            MismatchError,
            "'head.bias' has shape|'head",
        ),
        ({"experts": {"cats": {"a": torch.ones(2)}, "dogs": expert("dogs")}}, MismatchError, "'cats' lacks .* first"),
        (
            {"experts": {"cats": {**expert("cats"), "more": torch.ones(2)}, "dogs": expert("dogs")}},
            MismatchError,
            "has a tensor 'more', which the module lacks",
        ),
        ({"experts": {"cats": {}, "dogs": expert("dogs")}}, CheckpointError, "cats holds no tensors"),
        ({"inputs": torch.ones(1, 3, 6, 6)}, DataError, "two at least"),
        ({"inputs": {"x": torch.ones(3, 3, 6, 6), "shift": torch.ones(2, 8)}}, DataError, "as many rows"),
        ({"exclusive": {"rank": -1}}, RecipeError, "exclusive.rank"),
        ({"exclusive": {"rank": 1, "weighting": "inputs"}}, RecipeError, "is measured on transformers models"),
        ({"exclusive": {"rank": 1, "bn": "recalibrate"}}, RecipeError, "recalibrate runs transformers models"),
        ({"shared": {"method": "fisher"}}, RecipeError, "fisher measures transformers models"),
        ({"router_inputs": {"cats": images("cats")}, "features": "pool"}, DataError, "rows of every expert"),
        ({"router_inputs": {n: images(n) for n in NAMES}}, RecipeError, "features must name the submodule"),
        (
            {"router_inputs": {n: images(n) for n in NAMES}, "features": "neck"},
            RecipeError,
            "no submodule 'neck'; known are stem",
        ),
        (
            {"heads": ("neck",), "experts": {n: {**expert(n), "neck": torch.ones(1)} for n in NAMES}},
            MismatchError,
            "no t",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        build_from_state_dicts(seeded(), out=tmp_path / "twin", **refused(**changes))
    assert not (tmp_path / "twin").exists()


def test_no_code_of_a_file_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"code": Code()}, tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for file, words in (("evil.pt", "cannot be read as tensors alone"), ("list.pt", "holds a list")):
        sources = {"cats": tmp_path / file, "dogs": expert("dogs")}
        with pytest.raises(CheckpointError, match=words):
            build_from_state_dicts(seeded(), out=tmp_path / "twin", **refused(experts=sources))
    assert capsys.readouterr().out == ""
