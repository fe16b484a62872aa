"""Rounds of one storm: faults until the run ends; its bits beside those of a run left alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from faults import FAULTS, terminate
from storm import Ended, Storm
from training_process import (
    ADAPTER,
    bits_different,
    metrics_written,
    newest_whole_step,
    remove_run,
    saved_states,
    steps_logged,
)

_OFTEN = {"corrupted-state": 2}  # there are many places to damage a state at


@dataclass
class Tally:
    """What came of one kind of fault."""

    injected: int = 0
    survived: int = 0
    steps_lost: int = 0
    most_steps_lost: int = 0
    left_with: dict[str, int] = field(default_factory=dict)


class Chaos:
    """Rounds of one storm, and what they add up to.

    Args:
        storm: The run.
        calm: Folder of the same run, left alone.
        kinds: Faults to do.
        steps_between_saves: More may not be lost.
        strikes_a_round: At most; then the run is let come to its end.
    """

    def __init__(
        self,
        storm: Storm,
        calm: Path,
        kinds: Sequence[str],
        steps_between_saves: int,
        strikes_a_round: int | None = None,
    ) -> None:
        self.storm, self.kinds = storm, kinds
        self.tallies = {kind: Tally() for kind in kinds}
        self.failures: list[str] = []
        self.rounds = self.bits = self.compared = 0
        self._calm, self._bound, self._strikes = calm, steps_between_saves, strikes_a_round
        self._queue: list[str] = []

    def round(self, is_over: Callable[[], bool]) -> None:
        """One run to its end: faults while there is time or a kind left to try."""
        remove_run(self.storm.folder)
        strikes = 0
        try:
            while (not is_over() or self.untried) and strikes != self._strikes:
                self._strike(self._next())
                strikes += 1
        except Ended as end:
            if end.args[0] != 0:
                raise SystemExit(f"exit code {end.args[0]} without a fault") from None
        self.storm.settle()
        is_done = (self.storm.folder / "result.json").exists()
        if not is_done and (code := self.storm.finish()) != 0:
            raise SystemExit(f"the run cannot be finished (exit code {code})")
        ours, theirs = ((at / ADAPTER).read_bytes() for at in (self._calm, self.storm.folder))
        self.rounds += 1
        self.bits += bits_different(ours, theirs)
        self.compared += 8 * len(ours)

    @property
    def untried(self) -> list[str]:
        """Kinds that have not struck yet."""
        return [kind for kind, tally in self.tallies.items() if not tally.injected]

    def _next(self) -> str:
        if not self._queue:
            self._queue = [kind for kind in self.kinds for _ in range(_OFTEN.get(kind, 1))]
            self.storm.chance.shuffle(self._queue)
        return self._queue.pop()

    def _strike(self, kind: str) -> None:
        storm, tally, fault = self.storm, self.tallies[kind], FAULTS[kind]
        if not saved_states(storm.folder) and kind in ("lost-data", "nan"):
            terminate(storm)  # these strike as the run begins: let there be something to lose
        before, written, storm.given_up = newest_whole_step(storm.folder), self._written(), 0
        code = fault.strike(storm)
        if code == 0:
            raise Ended(0)
        tally.injected += 1
        tally.left_with[str(code)] = tally.left_with.get(str(code), 0) + 1
        after = newest_whole_step(storm.folder)
        lost = storm.given_up  # and what this process had done past its last save
        if self._written() != written:
            lost += max(0, steps_logged(storm.folder) - after)
        tally.steps_lost += lost
        tally.most_steps_lost = max(tally.most_steps_lost, lost)
        kept = after >= before - storm.given_up and lost - storm.given_up <= self._bound
        if code in fault.leaves_with and kept:
            tally.survived += 1
        else:
            self.failures.append(
                f"{kind}: exit code {code}; whole state {before} -> {after}, {lost} steps lost"
            )
            print(storm.last_words())
        print(f"{kind}: left with {code}, state of step {after}, {lost} lost", flush=True)

    def _written(self) -> bytes:
        return metrics_written(self.storm.folder)
