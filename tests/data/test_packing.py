"""Packing loses nothing, overfills nothing, wastes little and is always the same."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.data.packing import pack

LENGTHS = st.lists(st.integers(1, 64), max_size=200)


@settings(deadline=None)
@given(LENGTHS)
def test_every_example_is_in_exactly_one_row_and_no_row_is_overfull(lengths):
    rows = pack(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[index] for index in row) <= 64 for row in rows)


@settings(deadline=None)
@given(LENGTHS)
def test_rows_are_within_the_bound_of_best_fit_decreasing(lengths):
    fewest = -(-sum(lengths) // 64)  # not always reachable: halves of 33 need a row each
    large = sum(length > 32 for length in lengths)
    assert len(pack(lengths, 64)) <= 1.5 * max(fewest, large) + 1


@settings(deadline=None)
@given(LENGTHS, st.randoms())
def test_the_number_of_rows_depends_on_the_lengths_alone(lengths, rng):
    shuffled = lengths[:]
    rng.shuffle(shuffled)
    assert len(pack(shuffled, 64)) == len(pack(lengths, 64))


@settings(deadline=None)
@given(LENGTHS)
def test_best_fit_is_what_the_slow_reference_gives(lengths):
    """The few-line twin: look at every row, take the fullest that still has room."""
    rows, room = [], []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row in range(len(rows)) if room[row] >= lengths[index]]
        if fitting:
            row = min(fitting, key=lambda r: room[r])
        else:
            row = len(rows)
            rows.append([])
            room.append(64)
        rows[row].append(index)
        room[row] -= lengths[index]
    fast = pack(lengths, 64)
    sums = sorted(sum(lengths[i] for i in row) for row in fast)
    assert sums == sorted(sum(lengths[i] for i in row) for row in rows)


def test_a_hundred_thousand_chat_like_lengths_fill_rows_to_99_percent():
    rng = random.Random(0)
    lengths = [min(2048, max(8, int(rng.lognormvariate(5, 0.8)))) for _ in range(100_000)]
    rows = pack(lengths, 2048)
    assert sum(lengths) / (2048 * len(rows)) > 0.99


@pytest.mark.parametrize("lengths", [[0], [65], [3, -1]])
def test_a_length_that_fits_nowhere_is_refused(lengths):
    with pytest.raises(ValueError, match="between 1 and the capacity"):
        pack(lengths, 64)
