"""The window of the next step, made while this one computes.

A thread of its own makes one window at a time and holds one, on the host. Reading rows and decoding
pictures then cost a step nothing, unless they take longer than it. A window is a pure function of
its step and draws no random numbers, so it is the same whoever makes it and whenever: a resumed run
makes its first one anew. Given up: host memory for one more window, and a run that is left waits
for the window in the making.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

from qlora_trainer.tasks.task import Batch

Window = list[Batch]


class WindowsAhead:
    """Windows by step, made ahead; the thread is gone when the `with` block is left.

    Args:
        make: Collates the window of a step, on the host.
        stop: The first step that is not wanted any more.
    """

    def __init__(self, make: Callable[[int], Window], *, stop: int) -> None:
        self._make, self._stop = make, stop
        self._maker = ThreadPoolExecutor(1, "windows")
        self._ahead: tuple[int, Future[Window]] | None = None

    def window(self, step: int) -> Window:
        """Hand over the window of a step, and begin the next.

        Raises:
            BaseException: What failed when it was made, be that a step ago, with its traceback.
        """
        if self._ahead is None or self._ahead[0] != step:
            self._begin(step)
        assert self._ahead is not None
        window = self._ahead[1].result()
        self._ahead = None
        if step + 1 < self._stop:
            self._begin(step + 1)
        return window

    def rest(self) -> None:
        """Return when nothing is in the making: others may use what windows are made from."""
        if self._ahead is not None:
            wait([self._ahead[1]])

    def _begin(self, step: int) -> None:
        self._ahead = step, self._maker.submit(self._make, step)

    def __enter__(self) -> "WindowsAhead":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._maker.shutdown(cancel_futures=True)
        self._ahead = None
