"""What jobs compute in: no less precise than weights are stored, and never what this machine is slow at."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from tests.tiny import EXPERTS, Family
from twinmerge.cli import main
from twinmerge.errors import InputError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.hf.batches import PredictSettings
from twinmerge.hf.model import TwinModel
from twinmerge.jobs import grow
from twinmerge.jobs.build import build
from twinmerge.jobs.export import export
from twinmerge.jobs.predict import predict, predict_file
from twinmerge.runtime import precision as module

WHOLE = {"rank": 64, "embeddings": "exclusive"}
CHOICES = ("float32", "bfloat16")
UNKNOWN = "^precision must be auto, float32 or bfloat16, found 'float8'$"
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """Families that are stored in bfloat16."""
    made: dict[str, Family] = {}

    def get(name: str) -> Family:
        if name not in made:
            make, cls = tiny.BASES[name]
            side = "left" if name == "llama" else "right"
            root = tmp_path_factory.mktemp(name)
            base = make().to(torch.bfloat16)
            made[name] = tiny.make_family(root, base, getattr(transformers, cls), padding_side=side)
        return made[name]

    return get


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Makes this machine one that is the faster in a precision."""

    def become(fast: str) -> None:
        monkeypatch.setenv("TWINMERGE_CACHE", str(tmp_path / f"cache-{fast}"))
        monkeypatch.setattr(module, "fastest", lambda _: fast)

    return become


def rows() -> Rows:
    return [row for group in zip(*(tiny.text_rows(name, 8) for name in EXPERTS), strict=True) for row in group]


def write(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_the_precision_of_build_or_predict_changes_no_routing(
    family: Callable[[str], Family], narrow: Callable[[str], Family], tmp_path: Path, name: str, stored: str
) -> None:
    """The router is fitted on passes in one precision, and may be asked of passes in another."""
    source, chosen, sure = write(tmp_path / "rows.jsonl"), {}, {}
    for built in CHOICES:
        recipe = (family if stored == "float32" else narrow)(name).recipe(exclusive=WHOLE)
        artifact = build(recipe, tmp_path / built, precision=built, check=False)
        assert artifact.manifest.router.precision == built
        for asked in CHOICES:
            settings = PredictSettings(precision=asked, max_new_tokens=1)
            predict_file(artifact.path, source, tmp_path / "answers", settings, overwrite=True)
            answers = read(tmp_path / "answers")
            chosen[built, asked] = [answer["expert"] for answer in answers]
            sure[built, asked] = [answer["confidence"] for answer in answers]
    assert chosen["float32", "float32"] == list(EXPERTS) * 8
    assert all(found == list(EXPERTS) * 8 for found in chosen.values())
    assert all(found == pytest.approx(sure["float32", "float32"], abs=0.1) for found in sure.values())


def test_a_narrow_twin_is_computed_in_what_the_machine_is_fast_at(
    narrow: Callable[[str], Family], machine: Callable[[str], None], tmp_path: Path
) -> None:
    machine("float32")
    artifact = build(narrow("llama").recipe(exclusive=WHOLE), tmp_path / "twin")
    assert artifact.dtype == torch.bfloat16
    source, said = write(tmp_path / "rows.jsonl"), {}
    for fast in CHOICES:
        machine(fast)
        model = TwinModel.from_pretrained(artifact.path)
        assert {p.dtype for p in model.backbone.parameters()} == {getattr(torch, fast)}
        assert model.router is not None
        assert {b.dtype for b in model.router.parameters()} == {torch.float32}
        found = predict_file(artifact.path, source, tmp_path / fast, PredictSettings(max_new_tokens=2))
        assert found["precision"] == fast
        said[fast] = [answer["expert"] for answer in read(tmp_path / fast)]
        assert read(tmp_path / fast) == list(predict(model, rows(), max_new_tokens=2))
        kept = TwinModel.from_pretrained(artifact.path, dtype=torch.bfloat16)
        assert kept.backbone.dtype == torch.bfloat16  # what is asked for is done
        export(artifact.path, tmp_path / f"dense-{fast}", to="dense", expert="sms")
        specs = Checkpoint.open(tmp_path / f"dense-{fast}").specs
        assert {spec.dtype for spec in specs.values()} == {torch.bfloat16}  # an export is as stored on every machine
    assert said["float32"] == said["bfloat16"]


def test_wide_weights_are_computed_in_float32_unless_asked(
    twin: Callable[..., Path], machine: Callable[[str], None], tmp_path: Path
) -> None:
    machine("bfloat16")
    source, told = write(tmp_path / "rows.jsonl"), {}
    for choice in (None, "auto", "float32"):
        settings = PredictSettings(precision=choice)  # type: ignore[arg-type]
        told[choice] = predict_file(twin("bert"), source, tmp_path / str(choice), settings)["precision"]
    assert told == {None: "float32", "auto": "bfloat16", "float32": "float32"}
    assert read(tmp_path / "None") == read(tmp_path / "float32") != read(tmp_path / "auto")
    assert TwinModel.from_pretrained(twin("bert")).backbone.dtype == torch.float32


def test_a_twin_that_changes_is_fitted_in_the_precision_asked_for(
    twin: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert grow.remove(twin("bert"), "ag", out=tmp_path / "one").manifest.router.precision == "float32"
    out, asked = str(tmp_path / "other"), ["--expert", "ag", "--precision", "bfloat16"]
    assert main(["remove", str(twin("bert")), *asked, "--out", out]) == 0
    assert ", fitted in bfloat16\n" in capsys.readouterr().out


def test_a_router_of_tokens_has_no_precision(family: Callable[[str], Family], tmp_path: Path) -> None:
    recipe = family("bert").recipe(exclusive=WHOLE, router={"features": "tokens"})
    assert build(recipe, tmp_path / "twin", check=False).manifest.router.precision is None


def test_a_precision_that_nobody_knows_is_refused_before_any_work(
    twin: Callable[..., Path], family: Callable[[str], Family], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong: Any = "float8"
    source, target = write(tmp_path / "rows.jsonl"), tmp_path / "out"
    with pytest.raises(InputError, match=UNKNOWN):
        build(family("bert").recipe(), target, precision=wrong)
    with pytest.raises(InputError, match=UNKNOWN):
        grow.remove(twin("bert"), "ag", out=target, precision=wrong)
    with pytest.raises(InputError, match=UNKNOWN):
        predict_file(twin("bert"), source, target, PredictSettings(precision=wrong))
    with pytest.raises(InputError, match=UNKNOWN):
        list(predict(TwinModel.from_pretrained(twin("bert")), rows(), precision=wrong))
    assert not target.exists()
    with pytest.raises(SystemExit) as refused:
        main(["predict", str(twin("bert")), "--input", str(source), "--output", str(target), "--precision", "float8"])
    assert refused.value.code == 2
    assert "invalid choice: 'float8'" in capsys.readouterr().err
