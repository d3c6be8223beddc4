"""torch.compile of the gated model: dynamo captures it, and it gives the same numbers."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("mode", ["all", "gather", "merge"])
def test_a_compiled_twin_gives_the_same_states(mode: str) -> None:
    program = Path(__file__).with_name("compile_twin.py")
    done = subprocess.run([sys.executable, str(program), mode], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "frames captured" in done.stdout
