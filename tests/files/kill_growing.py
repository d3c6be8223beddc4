"""Kill a process that writes a growing file at each of its lines in turn; the next must end with the same bytes.

A program of its own: it forks, so nothing with threads may be imported.
"""

import os
import shutil
import sys
from pathlib import Path

from twinmerge.errors import OutputExistsError
from twinmerge.files import growing

PIECES = [b"%d\n" % number * (number + 1) for number in range(3)]


def write(target: Path) -> None:
    """A run with --resume."""
    with growing.growing_file(target, {"a": 1}, resume=True) as file:
        if not file.complete:
            for number in range(file.note["rows"] if file.note else 0, len(PIECES)):
                file.append(PIECES[number], {"rows": number + 1})


def killed_at(moment: int, target: Path) -> bool:
    """Whether a process that writes came to so many lines of the module, and was killed there."""
    child = os.fork()
    if child == 0:
        lines = 0

        def count(frame: object, event: str, _: object) -> object:
            nonlocal lines
            if getattr(frame, "f_code").co_filename != growing.__file__:  # noqa: B009
                return None
            lines += event == "line"
            if lines == moment:
                os._exit(9)  # nothing is flushed, nothing cleaned up
            return count

        sys.settrace(count)  # type: ignore[arg-type]
        write(target)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def main() -> None:
    """Print how many moments there were."""
    growing.os.fsync = lambda _: None  # type: ignore[assignment]  # a kill of the process, not of the machine
    folder = Path(sys.argv[1])
    moment = 1
    while killed_at(moment, folder / "out"):
        try:
            write(folder / "out")
        except OutputExistsError:
            left = (
                [path.name for path in (folder / ".out.partial").iterdir()]
                if (folder / ".out.partial").exists()
                else []
            )
            assert left == [], f"moment {moment}: {left}"  # it had ended but for an empty folder
        assert (folder / "out").read_bytes() == b"".join(PIECES), f"moment {moment}"
        shutil.rmtree(folder)
        folder.mkdir()
        moment += 1
    sys.stdout.write(str(moment - 1))


if __name__ == "__main__":
    main()
