"""What chaos says of a run is read from what its processes said and left."""

import random
import signal
import time
from pathlib import Path

import pytest
from faults import FAULTS, missing
from rounds import Chaos
from storm import Storm
from training_process import memory_growth
from working_clock import WorkingClock


def storm(place: Path, **changes: object) -> Storm:
    made = Storm([], place / "run", None, None, place / "said", random.Random(0), False, None)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_a_process_that_begins_anew_is_not_overlooked(tmp_path: Path) -> None:
    words = [
        b"step 0: held-out loss 2.0\nstep 1/40  loss 2.1\n",  # found nothing: no resumption
        b"resuming after\nstep 6 of 40\nstep 8/40  loss 1.0\n",
        b"no such file\n",  # refused before it could resume
        b"step 0: held-out loss 2.0\nstep 1/40  loss 2.1\n",
    ]
    made, begun = storm(tmp_path), []
    for said, newest in zip(words, (0, 6, 8, 8), strict=True):
        begun.append((sum(map(len, words[: len(begun)])), newest))
        assert said in b"".join(words)[begun[-1][0] :]
    made.said.write_bytes(b"".join(words))
    made.begun = begun
    assert made.resumes() == [(6, 6), (0, 8)]


def test_a_storm_that_has_not_begun_has_resumed_nothing(tmp_path: Path) -> None:
    assert storm(tmp_path).resumes() == []


def test_a_folder_is_not_made_read_only_for_root_without_a_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0, raising=False)
    assert "modes do not bind root" in str(missing("read-only", storm(tmp_path)))
    assert missing("read-only", storm(tmp_path, mounted=True)) is None
    monkeypatch.setattr("os.geteuid", lambda: 1000, raising=False)
    assert missing("read-only", storm(tmp_path)) is None


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="signals of Unix")
def test_more_steps_lost_than_lie_between_saves_are_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import faults
    import rounds

    made = storm(tmp_path)
    made.folder.mkdir()

    def strike(steps: int) -> faults.Fault:
        def kill(of: Storm) -> int:
            (of.folder / "metrics.jsonl").write_text(f'{{"step": {steps}}}\n')
            return -9

        return faults.Fault(kill, (-9,))

    monkeypatch.setattr(rounds, "FAULTS", {**FAULTS, "kill": strike(4), "terminate": strike(9)})
    chaos = Chaos(made, tmp_path, ["kill", "terminate"], steps_between_saves=4)
    chaos._strike("kill")
    assert (chaos.tallies["kill"].survived, chaos.failures) == (1, [])
    chaos._strike("terminate")
    assert chaos.tallies["terminate"].survived == 0
    assert "9 steps lost" in chaos.failures[0]


def test_time_in_which_the_machine_is_held_does_not_count() -> None:
    clock = WorkingClock()
    time.sleep(1.3)
    assert 0 < clock.seconds <= 1.3


def test_growth_is_of_the_last_quarter_over_the_second(tmp_path: Path) -> None:
    def of(sizes: list[int]) -> object:
        lines = [f'{{"step": {n}, "memory_bytes": {size}}}\n' for n, size in enumerate(sizes, 1)]
        (tmp_path / "metrics.jsonl").write_text("".join(lines))
        return memory_growth(tmp_path)

    assert of([1] * 7) is None
    assert of([1, 1, 100, 100, 500, 500, 110, 110]) == {
        "steps": 8, "second_quarter_bytes": 100, "last_quarter_bytes": 110,
        "growth": pytest.approx(0.1),
    }  # fmt: skip
