"""Two real processes over gloo: who waits, who is given up, and what their gradients add up to."""

import json
from typing import Any

import pytest
import torch

from tests.together import run_together
from tests.training.peers import WAIT_SECONDS, own_gradients

pytestmark = pytest.mark.slow
Seen = list[dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("peers")
    ended = run_together([["tests.training.peers", str(folder)]] * 2, folder)
    assert [code for code, _ in ended] == [0, 0], "\n".join(said for _, said in ended)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_one_that_is_busy_is_waited_for_longer_than_an_answer_may_take(seen: Seen) -> None:
    assert [process["busy"] for process in seen] == [[], []]


def test_a_fault_elsewhere_is_raised_when_the_busy_one_is_done(seen: Seen) -> None:
    assert seen[0]["fault"] == [["UserError", "process 1: no room"], True]
    assert seen[1]["fault"][0] == ["ToldElsewhereError", "no room"]


def test_memory_short_elsewhere_is_raised_when_the_busy_one_is_done(seen: Seen) -> None:
    assert seen[0]["memory"] == [["OutOfMemoryError", "process 1: made up"], True]


def test_one_that_lives_and_is_silent_is_given_up(seen: Seen) -> None:
    kind, said = seen[0]["silent"]
    assert kind == "PeerLostError"
    assert said.startswith("process 0 of 2: another process of this run is gone, or has not")
    assert f"answered for {WAIT_SECONDS:g} s" in said
    assert "the same command goes on from the last saved state" in said


def test_gradients_are_added_in_fp32_over_several_buckets(seen: Seen) -> None:
    loss, found = seen[0]["sums"]
    assert seen[1]["sums"] == [loss, found]  # the same bits in all
    assert loss == 1.5 + 2.5
    for one, other, summed in zip(own_gradients(0), own_gradients(1), found, strict=True):
        if one is None and other is None:
            assert summed is None  # as with one process
            continue
        assert other is not None
        expected = other.float() if one is None else one.float() + other.float()
        assert torch.equal(torch.tensor(summed), expected.to(other.dtype).float())
