"""From a step's number to its micro-batches: a pure function, so that resuming is an index.

An epoch is a sequence of micro-batches in an order of its own; a window takes
`gradient_accumulation_steps` of them, the last of an epoch what is left. Windows never cross
epochs. While one thread collates a window, others may ask for places and positions.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from qlora_trainer.tasks.task import Batch


class EpochBatches(Protocol):
    """The micro-batches of one epoch, by number."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, index: int) -> Batch:
        """Collate one, on the host."""
        ...


@dataclass(frozen=True)
class _Numbered:
    start: int
    count: int
    make: Callable[[int], Batch]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        return self.make(self.start + index)


@dataclass(frozen=True)
class Place:
    """Where a step stands: its epoch, and the numbers of its micro-batches."""

    epoch: int
    first: int
    stop: int


class Windows:
    """All windows of a run.

    Args:
        epoch_batches: Gives the micro-batches of an epoch; a pure function of its number.
        accumulation: Micro-batches of a window.
    """

    def __init__(self, epoch_batches: Callable[[int], EpochBatches], accumulation: int) -> None:
        self._epoch_batches = epoch_batches
        self._accumulation = accumulation
        self._ends: list[int] = []  # steps up to and including each epoch seen so far
        self._current: tuple[int, EpochBatches] | None = None
        self._looking = threading.RLock()

    @classmethod
    def numbered(cls, count: int, make: Callable[[int], Batch], accumulation: int) -> "Windows":
        """Windows over epochs of equal length whose micro-batches are numbered through the run.

        Args:
            count: Micro-batches of every epoch.
            make: Collates one, by its number over all epochs.
            accumulation: Micro-batches of a window.
        """
        return cls(lambda epoch: _Numbered(epoch * count, count, make), accumulation)

    def steps_of(self, epochs: int) -> int:
        """Steps of the first `epochs` epochs."""
        with self._looking:
            while len(self._ends) < epochs:
                count = len(self._epoch(len(self._ends)))
                if count == 0:
                    raise ValueError("an epoch without micro-batches")
                before = self._ends[-1] if self._ends else 0
                self._ends.append(before - (-count // self._accumulation))
            return self._ends[epochs - 1]

    def place(self, step: int) -> Place:
        """Find a step, counted from 0."""
        return self._find(step)[0]

    def position(self, steps: int) -> float:
        """Epochs passed after so many steps, for people."""
        if steps == 0:
            return 0.0
        place, batches = self._find(steps - 1)
        return round(place.epoch + place.stop / len(batches), 4)

    def window(self, step: int) -> list[Batch]:
        """Collate the micro-batches of a step."""
        place, batches = self._find(step)
        return [batches[index] for index in range(place.first, place.stop)]

    def _find(self, step: int) -> tuple[Place, EpochBatches]:
        """Where a step stands, and the micro-batches of its epoch."""
        with self._looking:
            while not self._ends or self._ends[-1] <= step:
                self.steps_of(len(self._ends) + 1)
            epoch = bisect_right(self._ends, step)
            batches = self._epoch(epoch)
            first = (step - (self._ends[epoch - 1] if epoch else 0)) * self._accumulation
            return Place(epoch, first, min(first + self._accumulation, len(batches))), batches

    def _epoch(self, epoch: int) -> EpochBatches:
        if self._current is None or self._current[0] != epoch:
            self._current = (epoch, self._epoch_batches(epoch))
        return self._current[1]
