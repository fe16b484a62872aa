"""Where a contender of `benchmark_step.py` waits between its steps, and how a step is weighed.

All contenders of a part live side by side, and only one of them works at a time: it arrives at its
gate, says on its pipe what its last step took, and blocks until the parent lets it do the next one
(`step_rounds.py`). Whatever lies between two steps (the next batch, a Trainer's bookkeeping) is
done before it arrives, so it is idle while others are timed. The pipe is the standard output the
process began with; what libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

import psutil
from benchmark_export import busy_seconds

from qlora_trainer.base.host_memory import give_back_free_memory


class Gate:
    """A contender's side of the pipe, with the clock and the scale of its steps.

    `begin` and `end` enclose a step; `say` adds what else is known of it, until the next `begin`
    or `leave` sends it all. The scale's zero is the resident memory as the contender first
    arrives, when what its loading left unused has been given back.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._zero: int | None = None
        self._last: dict[str, Any] = {}

    def begin(self) -> None:
        """Send the last step's figures, wait to be let through, and start the clock."""
        if self._zero is None:
            give_back_free_memory()
            self._zero = psutil.Process().memory_info().rss
        self._send_and_wait()
        self._resident = Resident()
        self._began = time.perf_counter()

    def end(self) -> None:
        """Stop the clock."""
        seconds = time.perf_counter() - self._began
        self._resident.stop()
        assert self._zero is not None
        self._last = {
            "step_seconds": seconds,
            "peak_step_bytes": self._resident.highest - self._zero,
            "cores_busy_elsewhere": self._resident.cores_busy_elsewhere,
        }

    def say(self, **known: float) -> None:
        """Add to the last step's figures."""
        self._last |= known

    def leave(self) -> None:
        """Send the last figures and stay until everybody has done."""
        self._send_and_wait()

    def _send_and_wait(self) -> None:
        print(json.dumps(self._last), file=self._answers, flush=True)
        if not sys.stdin.readline():  # nobody is there any more
            raise SystemExit(0)


class Resident:
    """The most resident memory of this process until `stop`, and who computed meanwhile.

    Attributes:
        highest: Bytes.
        cores_busy_elsewhere: Mean of the cores other programs used meanwhile; None where the
            system does not say.
    """

    def __init__(self) -> None:
        self.cores_busy_elsewhere: float | None = None
        self._began, self._own = time.perf_counter(), time.process_time()
        self._busy = busy_seconds()
        self._process = psutil.Process()
        self.highest = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.highest = max(self.highest, self._process.memory_info().rss)

    def stop(self) -> None:
        """Watch no longer."""
        self._done.set()
        self._thread.join()
        self.highest = max(self.highest, self._process.memory_info().rss)
        busy = busy_seconds()
        if self._busy is not None and busy is not None:
            others = busy - self._busy - (time.process_time() - self._own)
            self.cores_busy_elsewhere = max(0.0, others) / (time.perf_counter() - self._began)
