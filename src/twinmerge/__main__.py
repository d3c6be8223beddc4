"""Lets `python -m twinmerge` be the program."""

from twinmerge.cli import program

program()
