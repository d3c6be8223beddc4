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
from typing import Any, Literal, cast, get_args

import torch

from twinmerge.errors import InputError
from twinmerge.files.cache import cache_folder

Precision = Literal["float32", "bfloat16"]
PrecisionChoice = Literal["auto", "float32", "bfloat16"]

_REPEATS = 7
_ROWS, _INPUTS, _OUTPUTS = 128, 384, 1536
"""Of the layer that is timed on a processor."""
_MANY = 128
"""How many times these rows an accelerator is given: fewer would time how kernels are started."""
_WORTH = 1.25
"""How much faster bfloat16, which rounds more, must be."""
_HOPELESS = 4.0
"""How much slower than float32 needs no second look."""
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Variables that keep torch and oneDNN from instructions which the processor has."""


def require_known(choice: str | None) -> None:
    """Refuse a setting that stands for no precision.

    Raises:
        InputError: naming those that do.
    """
    if choice is not None and choice not in get_args(PrecisionChoice):
        raise InputError(f"precision must be auto, float32 or bfloat16, found {choice!r}")


def resolve(choice: PrecisionChoice, device: str | torch.device = "cpu") -> Precision:
    """The precision that a setting stands for; `auto` is the faster on a device of this machine.

    It is measured in a tenth of a second and kept in precision.json in the cache, under the processor's instructions,
    the limits set on them, the accelerator's name and torch's version: a machine makes the same choice every time.

    Raises:
        InputError: if there is no such setting.
    """
    require_known(choice)
    if choice != "auto":
        return choice
    path, key = cache_folder() / "precision.json", _machine(device)
    known = _read(path)
    found = known.get(key)
    if found in ("float32", "bfloat16"):
        return cast(Precision, found)
    measured = fastest(device)
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
    def of(
        cls, stored: torch.dtype, choice: PrecisionChoice | None = None, device: str | torch.device = "cpu"
    ) -> "Running":
        """What a choice means for stored weights on a device.

        Args:
            stored: dtype of the weights on disk.
            choice: see `resolve`; None is no less precise than the weights are stored: 32 bits and more as they are;
                16 bits as they are on an accelerator and on a processor that is fast at them, else in float32.
            device: where it runs.

        Raises:
            InputError: if there is no such setting.
        """
        narrow = stored.itemsize < 4
        if choice is None and (not narrow or torch.device(device).type != "cpu"):
            return cls(stored, "bfloat16" if stored == torch.bfloat16 else "float32")
        precision = resolve("auto" if choice is None else choice, device)
        if stored == torch.bfloat16 and precision == "bfloat16":
            return cls(stored, precision)
        return cls(torch.float32 if narrow else stored, "float32" if choice is None else precision)

    def context(self, device: str | torch.device = "cpu") -> AbstractContextManager[Any]:
        """What to run a model under; one that is there already stays where nothing else is needed."""
        narrower = self.products == "bfloat16" and self.dtype != torch.bfloat16
        return torch.autocast(torch.device(device).type, torch.bfloat16) if narrower else nullcontext()


def autocast(precision: Precision) -> torch.autocast:
    """Matrix products on the processor in this precision; weights stay as they are."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")


def fastest(device: str | torch.device = "cpu") -> Precision:
    """Time a layer of an encoder in both precisions, in turn, so that other work on the machine slows both."""
    where = torch.device(device)
    count = _ROWS if where.type == "cpu" else _ROWS * _MANY
    layer, rows = torch.nn.Linear(_INPUTS, _OUTPUTS, device=where), torch.randn(count, _INPUTS, device=where)

    def seconds(precision: Precision) -> float:
        with torch.inference_mode(), torch.autocast(where.type, torch.bfloat16, enabled=precision == "bfloat16"):
            started = time.perf_counter()
            layer(rows)[-1, -1].item()  # what is read is finished
            return time.perf_counter() - started

    float32 = bfloat16 = math.inf
    seconds("float32"), seconds("bfloat16")  # the first of each prepares kernels
    for _ in range(_REPEATS):
        float32, bfloat16 = min(float32, seconds("float32")), min(bfloat16, seconds("bfloat16"))
        if bfloat16 > _HOPELESS * float32:
            break
    return "bfloat16" if bfloat16 * _WORTH < float32 else "float32"


def _machine(device: str | torch.device = "cpu") -> str:
    """What the choice depends on, as a key."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    told = [platform.machine(), platform.processor(), *flags, torch.__version__]
    told += [f"{name}={os.environ.get(name)}" for name in _LIMITS]
    where = torch.device(device)
    if where.type != "cpu":
        told.append(torch.cuda.get_device_name(where) if where.type == "cuda" else where.type)
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
