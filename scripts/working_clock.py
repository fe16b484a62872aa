"""A clock that stands still while the machine holds this process. Standard library only."""

from __future__ import annotations

import threading
import time

_TICK_SECONDS = 0.5


class WorkingClock:
    """Seconds in which this process could work; while the machine holds it, none pass."""

    def __init__(self) -> None:
        self.seconds = 0.0
        threading.Thread(target=self._count, name="clock", daemon=True).start()

    def _count(self) -> None:
        while True:
            began = time.monotonic()
            time.sleep(_TICK_SECONDS)
            self.seconds += min(time.monotonic() - began, 2 * _TICK_SECONDS)
