"""The one search for borders, against the definition: whatever the guesses."""

import random

import pytest

from qlora_trainer.memory.border import last_that_fits


@pytest.mark.parametrize("count", [0, 1, 2, 7, 40])
def test_the_border_is_found_whatever_is_guessed_and_nothing_is_asked_twice(count: int) -> None:
    chance = random.Random(count)
    guesses = (
        lambda low, high: 0,
        lambda low, high: count - 1,
        lambda low, high: (low + high) // 2,
        lambda low, high: chance.randint(-3, count + 3),
    )
    for border in range(-1, count):
        for guess in guesses:
            asked: list[int] = []

            def fits(index: int, border: int = border, asked: list[int] = asked) -> bool:
                asked.append(index)
                return index <= border

            assert last_that_fits(count, fits, guess) == border
            assert len(set(asked)) == len(asked)
            assert set(asked) >= {border, border + 1} & set(range(count))
