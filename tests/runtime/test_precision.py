"""The precision is what this machine is fastest at, the same every time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from twinmerge.errors import InputError
from twinmerge.runtime import precision
from twinmerge.runtime.precision import Precision, PrecisionChoice, Running, autocast, fastest, resolve


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TWINMERGE_CACHE", str(tmp_path / "cache"))
    for variable in precision._LIMITS:  # these tests may run on such a machine
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What measuring finds next."""
    answers = ["bfloat16", "float32"]
    monkeypatch.setattr(precision, "fastest", lambda _: answers.pop(0))
    return answers


@pytest.mark.parametrize("chosen", ["float32", "bfloat16"])
def test_a_precision_that_is_named_is_not_measured(chosen: precision.Precision, measured: list[str]) -> None:
    assert resolve(chosen) == chosen
    assert len(measured) == 2


def test_a_machine_is_measured_once(measured: list[str], cache: Path) -> None:
    assert [resolve("auto"), resolve("auto")] == ["bfloat16", "bfloat16"]
    assert list(json.loads((cache / "precision.json").read_text()).values()) == ["bfloat16"]


@pytest.mark.parametrize("variable", ["ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"])
def test_limits_on_the_processor_are_another_machine(
    measured: list[str], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    assert resolve("auto") == "bfloat16"
    monkeypatch.setenv(variable, "avx2")
    assert resolve("auto") == "float32"
    monkeypatch.delenv(variable)
    assert resolve("auto") == "bfloat16"


def test_an_accelerator_is_measured_itself(measured: list[str]) -> None:
    assert [resolve("auto", "xpu"), resolve("auto"), resolve("auto", "xpu")] == ["bfloat16", "float32", "bfloat16"]
    assert Running.of(torch.bfloat16, "auto", "xpu") == Running(torch.bfloat16, "bfloat16")
    assert Running.of(torch.bfloat16, "auto", torch.device("cpu")) == Running(torch.float32, "float32")


def test_a_precision_that_nobody_knows_is_refused() -> None:
    for refuse in (resolve, lambda choice: Running.of(torch.float32, choice)):
        with pytest.raises(InputError, match="^precision must be auto, float32 or bfloat16, found 'float8'$"):
            refuse("float8")  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["", "[]", '{"KEY": "float8"}'])
def test_a_damaged_memory_is_measured_anew(measured: list[str], cache: Path, content: str) -> None:
    cache.mkdir()
    (cache / "precision.json").write_text(content.replace("KEY", precision._machine()))
    assert [resolve("auto"), resolve("auto")] == ["bfloat16", "bfloat16"]


def test_a_cache_that_cannot_be_written_is_measured_every_time(measured: list[str], cache: Path) -> None:
    cache.write_text("a file")
    assert [resolve("auto"), resolve("auto")] == ["bfloat16", "float32"]


def test_autocast_computes_in_the_precision() -> None:
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with autocast(name):  # type: ignore[arg-type]
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is dtype


def test_what_is_measured_is_one_of_the_two() -> None:
    assert fastest() in ("float32", "bfloat16")


def test_without_instructions_for_bfloat16_float32_is_the_fastest() -> None:
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    program = "from twinmerge.runtime.precision import resolve; print(resolve('auto'))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | limits, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "float32"


@pytest.mark.parametrize(
    ("stored", "choice", "device", "dtype", "products"),
    [
        ("float32", None, "cpu", "float32", "float32"),
        ("float64", None, "cpu", "float64", "float32"),
        ("bfloat16", None, "cuda", "bfloat16", "bfloat16"),
        ("float16", None, "cuda:1", "float16", "float32"),
        ("float16", None, "cpu", "float32", "float32"),
        ("bfloat16", "float32", "cpu", "float32", "float32"),
        ("bfloat16", "bfloat16", "cpu", "bfloat16", "bfloat16"),
        ("float32", "bfloat16", "cpu", "float32", "bfloat16"),
        ("float32", "float32", "cpu", "float32", "float32"),
    ],
)
def test_weights_are_computed_with_as_asked(
    stored: str, choice: PrecisionChoice | None, device: str, dtype: str, products: Precision, measured: list[str]
) -> None:
    found = Running.of(getattr(torch, stored), choice, device)
    assert (found.dtype, found.products) == (getattr(torch, dtype), products)


def test_what_this_machine_is_slow_at_is_left_to_float32(measured: list[str], cache: Path) -> None:
    assert Running.of(torch.bfloat16, None) == Running(torch.bfloat16, "bfloat16")
    assert Running.of(torch.float32, "auto").products == "bfloat16"
    (cache / "precision.json").unlink()
    assert Running.of(torch.bfloat16, None) == Running(torch.float32, "float32")
    assert Running.of(torch.float32, "auto") == Running(torch.float32, "float32")


def test_context_narrows_products_only_where_weights_are_wider() -> None:
    x = torch.ones(2, 2)
    with Running(torch.float32, "bfloat16").context():
        assert (x @ x).dtype == torch.bfloat16
    with autocast("bfloat16"), Running(torch.float32, "float32").context():
        assert (x @ x).dtype == torch.bfloat16  # the caller's own
