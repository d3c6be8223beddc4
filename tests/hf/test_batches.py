"""Which inputs share a batch."""

from hypothesis import given
from hypothesis import strategies as st

from twinmerge.hf.batches import DEFAULTS, BatchLimits, batches


@given(st.lists(st.integers(0, 30)), st.integers(1, 5), st.integers(1, 40))
def test_every_input_is_in_one_batch_and_no_batch_is_over_its_limits(
    lengths: list[int], rows: int, tokens: int
) -> None:
    found = batches(lengths, BatchLimits(rows, tokens))
    assert sorted(index for part in found for index in part) == list(range(len(lengths)))
    for part in found:
        assert 1 <= len(part) <= rows
        assert len(part) == 1 or len(part) * max(lengths[index] for index in part) <= tokens
    in_order = [lengths[index] for part in found for index in part]
    assert in_order == sorted(lengths, reverse=True)


def test_equal_lengths_keep_the_inputs_order() -> None:
    assert batches([4, 4, 4, 4], BatchLimits(rows=3)) == [[0, 1, 2], [3]]


def test_defaults_are_those_of_the_pages() -> None:
    assert (DEFAULTS.limits.rows, DEFAULTS.limits.tokens, DEFAULTS.max_new_tokens) == (64, 4096, 64)
