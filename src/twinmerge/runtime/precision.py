"""Chooses what matrix products are computed in: what this machine is fastest at, measured once and remembered."""

import hashlib
import json
import math
import os
import platform
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from twinmerge.files.cache import cache_folder

Precision = Literal["float32", "bfloat16"]
PrecisionChoice = Literal["auto", "float32", "bfloat16"]

_ROWS, _INPUTS, _OUTPUTS, _REPEATS = 128, 384, 1536, 7
_WORTH = 1.25
"""How much faster bfloat16, which rounds more, must be."""
_HOPELESS = 4.0
"""How much slower than float32 needs no second look."""
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Variables that keep torch and oneDNN from instructions which the processor has."""


def resolve(choice: PrecisionChoice) -> Precision:
    """The precision that a setting stands for; `auto` is the fastest of this machine's processor.

    It is measured in a tenth of a second and kept in precision.json in the cache, under the processor's instructions,
    the limits set on them and torch's version: a machine makes the same choice every time.
    """
    if choice != "auto":
        return choice
    path, key = cache_folder() / "precision.json", _machine()
    known = _read(path)
    found = known.get(key)
    if found in ("float32", "bfloat16"):
        return cast(Precision, found)
    measured = fastest()
    with suppress(OSError):  # where nothing can be kept, it is measured again
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps({**known, key: measured}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    return measured


@dataclass(frozen=True)
class Running:
    """How stored weights are computed with."""

    dtype: torch.dtype
    """Of the weights in memory."""
    products: Precision
    """Of matrix products; bfloat16 beside wider weights is autocast."""

    @classmethod
    def of(cls, stored: torch.dtype, choice: PrecisionChoice | None, device: str = "cpu") -> "Running":
        """What a choice means for stored weights on a device.

        Args:
            stored: dtype of the weights on disk.
            choice: see `resolve`; None is no less precise than the weights are stored: 32 bits and more as they are;
                16 bits as they are on an accelerator and on a processor that is fast at them, else in float32.
            device: where it runs.
        """
        narrow = stored.itemsize < 4
        if choice is None and (not narrow or not device.startswith("cpu")):
            return cls(stored, "bfloat16" if stored == torch.bfloat16 else "float32")
        precision = resolve("auto" if choice is None else choice)
        if stored == torch.bfloat16 and precision == "bfloat16":
            return cls(stored, precision)
        return cls(torch.float32 if narrow else stored, "float32" if choice is None else precision)

    def context(self, device: str = "cpu") -> AbstractContextManager[Any]:
        """What to run a model under; one that is there already stays where nothing else is needed."""
        narrower = self.products == "bfloat16" and self.dtype != torch.bfloat16
        return torch.autocast(torch.device(device).type, torch.bfloat16) if narrower else nullcontext()


def autocast(precision: Precision) -> torch.autocast:
    """Matrix products on the processor in this precision; weights stay as they are."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")


def fastest() -> Precision:
    """Time a layer of an encoder in both precisions, in turn, so that other work on the machine slows both."""
    layer, rows = torch.nn.Linear(_INPUTS, _OUTPUTS), torch.randn(_ROWS, _INPUTS)

    def seconds(precision: Precision) -> float:
        with torch.inference_mode(), autocast(precision):
            started = time.perf_counter()
            layer(rows)
            return time.perf_counter() - started

    float32 = bfloat16 = math.inf
    seconds("float32"), seconds("bfloat16")  # the first of each prepares kernels
    for _ in range(_REPEATS):
        float32, bfloat16 = min(float32, seconds("float32")), min(bfloat16, seconds("bfloat16"))
        if bfloat16 > _HOPELESS * float32:
            break
    return "bfloat16" if bfloat16 * _WORTH < float32 else "float32"


def _machine() -> str:
    """What the choice depends on, as a key."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    told = [platform.machine(), platform.processor(), *flags, torch.__version__]
    told += [f"{name}={os.environ.get(name)}" for name in _LIMITS]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
