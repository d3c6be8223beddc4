"""torch.compile of the gated model: dynamo captures it, and it gives the same numbers."""

import subprocess
import sys
from pathlib import Path


def test_a_compiled_twin_gives_the_same_states_in_every_mode() -> None:
    program = Path(__file__).with_name("compile_twin.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("frames captured") == 3
