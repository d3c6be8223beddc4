"""What a task is: labelled rows, their splits and the metric it is judged by."""

from collections.abc import Sequence
from dataclasses import dataclass

from twinmerge.errors import DataError
from twinmerge.eval.metrics import METRICS
from twinmerge.files.rows import Row


@dataclass(frozen=True)
class Task:
    """A labelled data set, the metric it is judged by and its two splits.

    Attributes:
        name: the task's name, the key of its scores everywhere.
        metric: a name in `twinmerge.eval.metrics.METRICS`.
        positive_label: the class that `f1` is about; None for the other metrics.
        validation: labelled rows that settings may be chosen on.
        test: labelled rows that nothing is chosen on.

    Raises:
        DataError: if the metric is unknown, `positive_label` does not fit it, or `test` is empty.
    """

    name: str
    metric: str
    positive_label: str | None
    validation: Sequence[Row]
    test: Sequence[Row]

    def __post_init__(self) -> None:
        """Check that the metric can be computed on the test rows."""
        if self.metric not in METRICS:
            raise DataError(f"task {self.name!r}: unknown metric {self.metric!r}; known: {', '.join(METRICS)}")
        if not self.test:
            raise DataError(f"task {self.name!r} has no test rows")
        if (self.metric == "f1") != (self.positive_label is not None):
            raise DataError(
                f"task {self.name!r}: metric 'f1', and only that one, needs a positive_label; "
                f"found metric {self.metric!r} with positive_label {self.positive_label!r}"
            )
        if self.positive_label is not None and self.positive_label not in labels_of(self.test):
            raise DataError(f"task {self.name!r}: no test row has the positive_label {self.positive_label!r}")


def labels_of(rows: Sequence[Row]) -> list[str]:
    """The labels of labelled rows, in order."""
    return [row["label"] for row in rows]
