import pytest

from twinmerge.errors import DataError
from twinmerge.eval.tasks import Task, labels_of

ROWS = [{"text": "hi", "label": "spam"}, {"text": "ho", "label": "ham"}]


def test_task_knows_its_metric_and_its_splits() -> None:
    task = Task("sms", "f1", "spam", validation=[], test=ROWS)
    assert (task.metric, labels_of(task.test)) == ("f1", ["spam", "ham"])


@pytest.mark.parametrize(
    ("metric", "positive_label", "test", "message"),
    [
        ("f2", None, ROWS, "task 'sms': unknown metric 'f2'; known: accuracy, f1, macro_f1"),
        ("accuracy", None, [], "task 'sms' has no test rows"),
        ("f1", None, ROWS, "metric 'f1', and only that one, needs a positive_label; found metric 'f1' with .* None"),
        ("accuracy", "spam", ROWS, "found metric 'accuracy' with positive_label 'spam'"),
        ("f1", "Spam", ROWS, "task 'sms': no test row has the positive_label 'Spam'"),
    ],
)
def test_task_that_cannot_be_scored_is_refused(
    metric: str, positive_label: str | None, test: list[dict[str, str]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Task("sms", metric, positive_label, validation=[], test=test)
