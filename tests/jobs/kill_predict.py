"""Kill `twinmerge predict` at random moments and go on; the output must be that of an undisturbed run.

    python tests/jobs/kill_predict.py TWIN ROWS.jsonl FOLDER TRIALS

A program of its own: it loads the libraries once and forks, which nothing with threads may do.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from twinmerge.cli import main as twinmerge
from twinmerge.jobs import predict

WINDOW = 16
KILLS = 5
"""An output, at most on average; a busy machine would else kill without end what has hardly begun."""


def start(twin: str, source: str, target: Path) -> int:
    """A child that goes on with what is there; its process id."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(twinmerge(["predict", twin, "--input", source, "--output", str(target), "--resume"]))
    return child


def ended(child: int) -> int:
    """Wait; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Print how many kills met a run at work, and how many of those left work to go on with."""
    twin, source, folder, trials = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    predict.WINDOW_ROWS = WINDOW
    chance = random.Random(0)
    started = time.monotonic()
    assert ended(start(twin, source, folder / "whole")) == 0
    seconds = time.monotonic() - started
    whole = (folder / "whole").read_bytes()
    kills = resumed = 0
    for trial in range(trials):
        target = folder / f"killed-{trial}"
        while not target.exists() and kills < KILLS * (trial + 1):
            child = start(twin, source, target)
            time.sleep(chance.uniform(0.1, 1.0) * seconds)
            os.kill(child, signal.SIGKILL)
            code = ended(child)
            if code == 0:
                break
            assert code == -signal.SIGKILL, code
            kills += 1
            resumed += (folder / f".{target.name}.partial" / "journal").exists()
        if not target.exists() or (folder / f".{target.name}.partial").exists():
            assert ended(start(twin, source, target)) == 0
        assert target.read_bytes() == whole, f"trial {trial}: other bytes"
    sys.stdout.write(f"{kills} {resumed}")


if __name__ == "__main__":
    main()
