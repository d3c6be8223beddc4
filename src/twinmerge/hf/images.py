"""Reads images, from a path, bytes or a data URI, and makes of them what a model takes."""

import base64
import binascii
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor

from twinmerge.errors import DataError, MismatchError, MissingExtraError
from twinmerge.files.tables import DATA_URI
from twinmerge.hf.loading import LOCAL, quiet

PROCESSOR = "preprocessor_config.json"
"""Where a folder says how images are prepared."""


def reads_images(model: Any) -> bool:
    """Whether a transformers model takes pictures, not texts."""
    return bool(model.main_input_name == "pixel_values")


def load_processor(folder: Path, model: Any = None) -> Any:
    """How a folder prepares images, None if it does not say, or if `model` is given and reads none.

    Raises:
        MismatchError: if transformers has no such processor.
        MissingExtraError: if Pillow is not installed.
    """
    if not (folder / PROCESSOR).is_file() or not (model is None or reads_images(model)):
        return None
    _pillow()
    try:
        with quiet():
            load: Any = AutoImageProcessor.from_pretrained
            return load(folder, **LOCAL)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise MismatchError(
            f"{folder / PROCESSOR} names no known processor: {str(error).split('. Should')[0]}"
        ) from error


def open_image(source: object, channels: int = 3) -> Any:
    """A picture as its camera held it, decoded whole.

    Args:
        source: a path, bytes of a file, or a data URI.
        channels: 3 for colour, 1 for grey.

    Raises:
        DataError: if there is no such file, or it is no picture or a damaged one.
        MissingExtraError: if Pillow is not installed.
    """
    pillow = _pillow()
    try:
        with pillow.Image.open(_file(source)) as image:
            turned = pillow.ImageOps.exif_transpose(image)
            return turned.convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, SyntaxError, binascii.Error, pillow.Image.DecompressionBombError) as error:
        raise DataError(f"image {_short(source)} cannot be read: {_reason(error)}") from error


def prepare(processor: Any, sources: Sequence[object], channels: int = 3) -> list[Tensor]:
    """Pictures as a model takes them, (channel, height, width) each, float32.

    Raises:
        DataError: naming the first that cannot be read.
    """
    found = []
    for source in sources:
        image = open_image(source, channels)
        try:
            made = processor(images=image, return_tensors="pt")["pixel_values"][0]
        except ValueError as error:
            raise DataError(f"image {_short(source)} of {image.size} cannot be prepared: {_reason(error)}") from error
        found.append(made.to(torch.float32))
    return found


def _file(source: object) -> Any:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    text = str(source)
    if not text.startswith(DATA_URI):
        return Path(text)
    head, comma, content = text.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError("a data URI must be data:image/...;base64,...")
    return io.BytesIO(base64.b64decode(content, validate=True))


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise MissingExtraError("images are read with Pillow: pip install 'twinmerge[vision]'") from error
    return PIL


def _short(source: object) -> str:
    text = f"of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    return text if len(text) <= 80 or not text.startswith(DATA_URI) else text[:40] + "..."


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0].split(" <_io")[0]
