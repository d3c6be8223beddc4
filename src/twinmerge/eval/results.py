"""Results as frozen records: what results.json and the prediction files hold, and how they are read and written."""

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator

from twinmerge.errors import DataError
from twinmerge.eval.metrics import RESAMPLES, ReliabilityBin

Protocol = Literal["routed", "oracle_head"]
"""Who picks the head: the router (no task ID), or the caller who knows the task."""

Kind = Literal["base", "experts", "static", "dynamic", "twin"]
"""The pretrained base, the experts themselves, static merges, other ways to choose per input, twins."""

Slug = Annotated[str, StringConstraints(pattern=r"^\w[\w.+-]*$")]
"""A contestant's name: letters, digits, `_ . + -`, so that it can be part of a file's name."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TaskPredictions(_Record):
    """Test rows of one task: true labels and, in their order, what its expert and the contestant answered.

    Attributes:
        positive_label: the class that `f1` is about, else None.
        oracle_head: by the head of the task.
        routed: `MISROUTED` where the router picked another head; None without a router.
    """

    metric: str
    positive_label: str | None
    labels: list[str]
    expert: list[str]
    oracle_head: list[str]
    routed: list[str] | None


class Predictions(_Record):
    """All test predictions of one contestant at one seed: enough to recompute every interval."""

    contestant: Slug
    seed: int
    tasks: dict[str, TaskPredictions]


class Interval(_Record):
    """A value and its bootstrap 95 % interval, all on the scale of the value."""

    value: float
    low: float
    high: float


class TaskScore(_Record):
    """Raw scores on one task, 0 to 1."""

    metric: str
    routed: float | None
    oracle_head: float
    expert: float
    rows: int


class ContestantResult(_Record):
    """One contestant at one seed.

    Attributes:
        settings: whatever made it so, for the record.
        bytes: on disk, by part: shared, exclusive, heads, router.
        exclusive_ratio: exclusive bytes / bytes of the base.
        ms_per_input: milliseconds an input takes, routing included; None if not measured.
        normalized_routed: 1.0 = the experts; None without a router.
        gate_mean: by task, the mean gate of each expert; None without a gate.
        confusion: by task, how many test rows were routed to each expert.
        unseen: raw score by task that no expert was trained on; empty at seeds where it was not taken.
    """

    name: Slug
    title: str
    kind: Kind
    seed: int
    settings: dict[str, str | int | float | bool | None]
    bytes: dict[str, int]
    exclusive_ratio: float
    ms_per_input: float | None
    tasks: dict[str, TaskScore]
    normalized_routed: Interval | None
    normalized_oracle_head: Interval
    gate_mean: dict[str, dict[str, float]] | None = None
    confusion: dict[str, dict[str, int]] | None = None
    unseen: dict[str, float] = {}


class RouterResult(_Record):
    """A router on its own, as the recipe words it: which expert does an input belong to.

    Attributes:
        inputs_per_expert: router rows of each expert it was fitted on.
        accuracy: on test rows, 0 to 1; so are calibration error and reliability.
        held_out_accuracy: on held-out router rows, that selection saw; None if nothing was held out.
        seconds: time to fit it, features included.
        reliability: empty if not recorded.
    """

    features: str
    method: str
    inputs_per_expert: int
    seed: int
    accuracy: float
    held_out_accuracy: float | None
    calibration_error: float
    nbytes: int
    seconds: float
    reliability: list[ReliabilityBin] = []


class TaskSummary(_Record):
    """Mean over seeds of one task's scores: raw 0 to 1, normalized 1.0 = the expert."""

    metric: str
    rows: int
    expert: float
    routed: float | None
    oracle_head: float
    normalized_routed: float | None
    normalized_oracle_head: float


class Summary(_Record):
    """One contestant over the seeds it ran at: means, the sum of `confusion`, and intervals.

    Attributes:
        routed_by_seed: normalized score of each seed; empty without a router.
    """

    name: str
    title: str
    kind: Kind
    seeds: list[int]
    normalized_routed: Interval | None
    normalized_oracle_head: Interval
    routed_by_seed: list[float]
    oracle_head_by_seed: list[float]
    exclusive_ratio: float
    bytes: dict[str, int]
    ms_per_input: float | None
    tasks: dict[str, TaskSummary]
    gate_mean: dict[str, dict[str, float]] | None
    confusion: dict[str, dict[str, int]] | None
    unseen: dict[str, float]


class Comparison(_Record):
    """Normalized score of one contestant minus another's, on the same resamples."""

    contestant: str
    reference: str
    protocol: Protocol
    difference: Interval


class Environment(_Record):
    """Where and with what the figures were measured."""

    versions: dict[str, str]
    machine: str
    threads: int
    commit: str
    date: str


class SuiteResult(_Record):
    """Everything a run of a suite found; results.json is this record.

    Attributes:
        base: name of the base model.
        base_bytes: its size on disk.
        expert_bytes: size on disk of all experts, and of the base where they are adapters.
        tasks: names, in the order they are shown.
        resamples: bootstrap resamples behind each interval.
        contestants: one entry for each contestant and seed.
        summaries: one for each contestant, in the order they are shown.
        sources: citations of data, models and methods.
    """

    format: Literal[2] = 2
    suite: str
    base: str
    base_bytes: int
    expert_bytes: int
    tasks: list[str]
    seeds: list[int]
    resamples: int = RESAMPLES
    contestants: list[ContestantResult]
    summaries: list[Summary]
    comparisons: list[Comparison] = []
    routers: list[RouterResult] = []
    environment: Environment
    sources: list[str] = []

    @model_validator(mode="after")
    def _names_agree(self) -> "SuiteResult":
        ran, summed = list(dict.fromkeys(one.name for one in self.contestants)), [one.name for one in self.summaries]
        if sorted(ran) != sorted(summed):
            raise ValueError(f"contestants are {ran}, their summaries {summed}")
        for one in self.contestants:
            if set(one.tasks) != set(self.tasks):
                raise ValueError(f"contestant {one.name!r} has scores of {sorted(one.tasks)}, the suite {self.tasks}")
        for pair in self.comparisons:
            if not {pair.contestant, pair.reference} <= set(summed):
                raise ValueError(f"a comparison names {pair.contestant!r} and {pair.reference!r}, not both contestants")
        return self


_R = TypeVar("_R", bound=_Record)


def write_result(result: SuiteResult, path: Path) -> None:
    """Write results.json; `read_result` gives the same result to the bit."""
    path.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_result(path: Path) -> SuiteResult:
    """Read results.json.

    Raises:
        DataError: if the file cannot be read or is no result of this format.
    """
    return _read(SuiteResult, path, Path.read_bytes)


def write_predictions(predictions: Predictions, folder: Path) -> Path:
    """Write `CONTESTANT.seed-N.predictions.json.gz` into a folder; the same predictions give the same bytes."""
    path = folder / f"{predictions.contestant}.seed-{predictions.seed}.predictions.json.gz"
    path.write_bytes(gzip.compress(predictions.model_dump_json().encode(), mtime=0))
    return path


def read_predictions(path: Path) -> Predictions:
    """Read what `write_predictions` wrote.

    Raises:
        DataError: if the file cannot be read or holds no predictions.
    """
    return _read(Predictions, path, lambda file: gzip.decompress(file.read_bytes()))


def _read(record: type[_R], path: Path, load: Callable[[Path], bytes]) -> _R:
    try:
        return record.model_validate_json(load(path))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{path} holds no {record.__name__} of this version: {where}: {first['msg']}") from error
