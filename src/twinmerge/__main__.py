"""Lets `python -m twinmerge` be the program."""

import sys

from twinmerge.cli import main

sys.exit(main())
