"""Every exception this package raises on purpose, and the exit code each one means.

TwinMergeError                 exit 1: the work failed
├── MissingExtraError          exit 1: an optional dependency is not installed
├── WorkerError                exit 1: worker processes died again and again
├── CheckError                 exit 1: a finished twin does not compute what it should
└── InputError                 exit 2: what the caller gave cannot be used
    ├── RecipeError            a recipe or its parameters
    ├── CheckpointError        a file of weights
    ├── MismatchError          an expert and its base
    ├── RankError              a rank
    ├── DataError              rows of data
    ├── GateError              a gate
    ├── ArtifactError          a twin's folder
    └── OutputExistsError      the place to write to
"""

from __future__ import annotations

from typing import ClassVar


class TwinMergeError(Exception):
    """The root: anything this package raises on purpose."""

    exit_code: ClassVar[int] = 1


class MissingExtraError(TwinMergeError):
    """An optional dependency is needed and not installed; the message names the install line."""


class WorkerError(TwinMergeError):
    """Worker processes died again and again; what they should have done is not to blame for sure."""


class CheckError(TwinMergeError):
    """A finished twin does not compute what its definition says; it is not published."""


class InputError(TwinMergeError):
    """Something the caller gave cannot be used."""

    exit_code: ClassVar[int] = 2


class RecipeError(InputError):
    """A recipe is not valid: unknown key, wrong type, value out of range."""


class CheckpointError(InputError):
    """A file of weights is missing, damaged, contradictory or holds values no model should have."""


class MismatchError(InputError):
    """An expert does not fit the base it is said to come from."""


class RankError(InputError):
    """A rank is not an integer in `[0, min(out, in)]`, or factors do not fit each other."""


class DataError(InputError):
    """Rows of data are missing, empty or not of the expected form."""


class GateError(InputError):
    """A gate has the wrong shape, names unknown experts or holds values that are not finite."""


class ArtifactError(InputError):
    """A twin's folder is incomplete, damaged or was written by an unknown version."""


class OutputExistsError(InputError):
    """The place to write to is taken, and overwriting was not asked for."""
