"""A disk that fills up, for real where one may be mounted: nothing half-made stays, what is finished is used."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import tiny
from tests.tiny import EXPERTS, Family
from twinmerge.cli import main
from twinmerge.files.hashes import sha256_of
from twinmerge.jobs.build import open_plan
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.twin.budget import Needs
from twinmerge.twin.recipe import Recipe


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("models")
    made = tiny.make_family(root, tiny.llama(), tiny.transformers.LlamaForCausalLM)
    experts = "".join(f"  {name}: {{model: {name}, router_data: {name}.jsonl}}\n" for name in EXPERTS)
    (root / "build.yaml").write_text(f"base: base\nexperts:\n{experts}exclusive: {{rank: 8}}\n")
    models = "".join(f"  {name}: {name}\n" for name in EXPERTS)
    (root / "merge.yaml").write_text(f"base: base\nexperts:\n{models}")
    return made


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A disk of so many kilobytes."""
    place = tmp_path / "disk"
    place.mkdir()
    size = f"size={request.param}k"
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)], check=False, capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("this process may not mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("disk", [8, 16, 32, 64, 96, 128], indirect=True)
@pytest.mark.parametrize("command", ["build", "merge"])
@pytest.mark.parametrize("believed", [False, True])
def test_a_full_disk_leaves_nothing_half_made(
    family: Family,
    disk: Path,
    command: str,
    believed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Said before any work; where the disk seemed to have room, at the write that failed."""
    needed = Needs.of(open_plan(Recipe.load(family.root / "build.yaml"))).disk_bytes
    assert needed > 128 * 1024
    if believed:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    done = main([command, str(family.root / f"{command}.yaml"), "--out", str(disk / "new" / "out")])
    if done == 0:
        assert command == "merge" or believed
        return
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("twinmerge")]
    assert done == 1
    assert ("No space left on device" in line) if believed else ("GB are needed" in line)
    assert not (disk / "new" / "out").exists()
    assert believed or list(disk.iterdir()) == []  # what is finished is kept where work had begun
    if believed:
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        again = [command, str(family.root / f"{command}.yaml"), "--out"]
        assert main([*again, str(disk / "new" / "out"), "--resume"]) == 0
        assert main([*again, str(disk / "calm")]) == 0
        assert weights(disk / "new" / "out") == weights(disk / "calm")
        assert [path.name for path in (disk / "new").iterdir()] == ["out"]


def weights(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("disk", [200], indirect=True)
def test_what_lies_in_the_place_survives_a_full_disk(
    family: Family, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = str(family.root / "build.yaml"), disk / "out"
    subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
    assert main(["build", recipe, "--out", str(out)]) == 0
    used = shutil.disk_usage(disk).used
    subprocess.run(["mount", "-o", f"remount,size={used // 1024 + 40}k", str(disk)], check=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    assert main(["build", recipe, "--out", str(out), "--overwrite"]) == 1
    assert {path.name for path in disk.iterdir()} <= {"out", ".out.partial"}
    TwinArtifact.open(out).verify()
