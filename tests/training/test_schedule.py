import itertools

import pytest

from qlora_trainer.training.schedule import learning_rate_factor


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_starts_above_zero_reaches_the_peak_and_never_jumps(schedule: str) -> None:
    factors = [
        learning_rate_factor(s, total_steps=100, warmup_steps=10, schedule=schedule)  # type: ignore[arg-type]
        for s in range(100)
    ]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert all(abs(a - b) <= 0.1 + 1e-9 for a, b in itertools.pairwise(factors))
    assert all(a >= b for a, b in itertools.pairwise(factors[9:]))
    assert factors[-1] == (1.0 if schedule == "constant" else pytest.approx(0, abs=0.02))


def test_the_floor_is_where_it_ends() -> None:
    ends = learning_rate_factor(10**6, total_steps=10, warmup_steps=0, schedule="cosine", floor=0.1)
    assert ends == pytest.approx(0.1)


def test_a_run_of_warm_up_only_is_defined() -> None:
    assert learning_rate_factor(3, total_steps=4, warmup_steps=4, schedule="linear") == 1.0
    assert learning_rate_factor(0, total_steps=1, warmup_steps=0, schedule="cosine") == 1.0
