"""Steps timed and weighed, alike for every contender of `benchmark_step.py`."""

from __future__ import annotations

import statistics
import threading
import time
from typing import Any

import psutil
from benchmark_export import busy_seconds
from step_data import Batch


def timed(step: Any, batches: list[Batch], losses: list[float]) -> dict[str, Any]:
    """Run every batch; the first step warms up and is not timed."""
    seconds = []
    with Resident() as resident:
        for batch in batches:
            began = time.perf_counter()
            step(batch)
            seconds.append(time.perf_counter() - began)
    return figures(seconds, [batch["input_ids"].numel() for batch in batches], resident, losses)


class Resident:
    """The most resident memory inside the block, above what stood before it; and who computed.

    Attributes:
        cores_busy_elsewhere: Mean of the cores other programs used meanwhile; None where the
            system does not say.
    """

    cores_busy_elsewhere: float | None = None

    def __enter__(self) -> Resident:
        self._began, self._own, self._busy = (
            time.perf_counter(),
            time.process_time(),
            busy_seconds(),
        )
        self._process = psutil.Process()
        self._before = self._highest = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._highest = max(self._highest, self._process.memory_info().rss)
        busy = busy_seconds()
        if self._busy is not None and busy is not None:
            others = busy - self._busy - (time.process_time() - self._own)
            self.cores_busy_elsewhere = max(0.0, others) / (time.perf_counter() - self._began)

    @property
    def grown_bytes(self) -> int:
        """Highest minus what stood before."""
        return self._highest - self._before


def figures(
    seconds: list[float], counts: list[int], resident: Resident, losses: list[float]
) -> dict[str, Any]:
    """What the benchmark compares; the first step has warmed up where there is another."""
    first = 1 if len(seconds) > 1 else 0
    each = [a / b for a, b in zip(counts[first:], seconds[first:], strict=True)]
    return {
        "step_seconds": statistics.median(seconds[first:]),
        "tokens_per_second": statistics.median(each),
        "peak_step_bytes": resident.grown_bytes,
        "cores_busy_elsewhere": resident.cores_busy_elsewhere,
        "losses": losses,
    }
