"""The program: parses arguments, calls the library, prints; nothing heavy is imported before a command runs."""

import gc
import os
import sys
from collections.abc import Sequence

from twinmerge.cli.parser import build_parser
from twinmerge.errors import TwinMergeError

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


def program() -> None:
    """The process: `main`, its imports seldom searched for garbage, and not at all at the end."""
    gc.set_threshold(100_000)
    code = main()
    gc.freeze()
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: without the program's name; None takes the process's.

    Returns:
        0, 1 (failed), 2 (what was asked cannot be done as asked) or 130 (interrupted).
    """
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except TwinMergeError as error:
        _complain(str(error), error)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        _complain(f"{error.filename or 'the system'}: {error.strerror or error}", error)
        return EXIT_FAILED
    except KeyboardInterrupt as error:
        kept = hasattr(error, "__notes__")
        _complain("interrupted" if kept else "interrupted; nothing half-made was left", error)
        return EXIT_INTERRUPTED
    return 0


def _complain(message: str, error: BaseException) -> None:
    """In one line, with what is kept of the work."""
    line = "; ".join([message, *getattr(error, "__notes__", [])])
    sys.stderr.write(f"twinmerge: error: {' '.join(line.split())}\n")
