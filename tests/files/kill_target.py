"""Kill a process that writes a target at each line of the module in turn; the next must end with the same bytes.

    python tests/files/kill_target.py FOLDER file|folder|exchanged|renamed

A program of its own: it forks, so nothing with threads may be imported. `exchanged` and `renamed` replace a folder,
with and without the system's help.
"""

import os
import shutil
import sys
from pathlib import Path

from twinmerge.errors import OutputExistsError
from twinmerge.files import target as module

PIECES = [b"%d\n" % number * (number + 1) for number in range(3)]


def write_file(target: Path, kind: str) -> None:
    """A run with --resume."""
    with module.growing_file(target, {"a": 1}, resume=True) as file:
        if not file.complete:
            for number in range(file.last["rows"] if file.last else 0, len(PIECES)):
                file.append(PIECES[number], {"rows": number + 1}, f"{number + 1} pieces are")


def write_folder(target: Path, kind: str) -> None:
    """A run with --resume, and --overwrite where there is something to replace; parts are made once."""
    with module.durable_folder(target, {"a": 1}, resume=True, overwrite=kind != "folder") as folder:
        if not folder.complete:
            for number, piece in enumerate(PIECES):
                if str(number) not in folder.finished:
                    (folder.work / str(number)).write_bytes(piece)
                    folder.record(str(number), "digest")
            folder.clear()
            (folder.folder / "all").write_bytes(b"".join((folder.work / str(n)).read_bytes() for n in range(3)))


def content(target: Path) -> bytes:
    """What has the target's name."""
    return (target / "all" if target.is_dir() else target).read_bytes()


def killed_at(moment: int, target: Path, kind: str) -> bool:
    """Whether a process that writes came to so many lines of the module, and was killed there."""
    child = os.fork()
    if child == 0:
        lines = 0

        def count(frame: object, event: str, _: object) -> object:
            nonlocal lines
            if getattr(frame, "f_code").co_filename != module.__file__:  # noqa: B009
                return None
            lines += event == "line"
            if lines == moment:
                os._exit(9)  # nothing is flushed, nothing cleaned up
            return count

        sys.settrace(count)  # type: ignore[arg-type]
        WRITE[kind](target, kind)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


MAY_BE = {"file": {None}, "folder": {None}, "exchanged": {b"old"}, "renamed": {b"old", None}}
"""What may have the target's name after a kill, beside what is written."""
WRITE = {"file": write_file, "folder": write_folder, "exchanged": write_folder, "renamed": write_folder}


def main() -> None:
    """Print how many moments there were."""
    module.os.fsync = lambda _: None  # type: ignore[assignment]  # a kill of the process, not of the machine
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    if kind == "renamed":
        module._exchange = lambda *_: False
    whole, target, moment = b"".join(PIECES), folder / "out", 1
    while True:
        if kind in ("exchanged", "renamed"):
            target.mkdir()
            (target / "all").write_bytes(b"old")
        if not killed_at(moment, target, kind):
            break
        there = content(target) if target.exists() else None
        assert there in MAY_BE[kind] | {whole}, f"moment {moment}: {there!r}"
        try:
            WRITE[kind](target, kind)
        except OutputExistsError:  # it had ended but for the folder beside it, or that was empty
            assert not list((folder / ".out.partial").glob("*")), f"moment {moment}"
        assert content(target) == whole, f"moment {moment}"
        shutil.rmtree(folder)
        folder.mkdir()
        moment += 1
    sys.stdout.write(str(moment - 1))


if __name__ == "__main__":
    main()
