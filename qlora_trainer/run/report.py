"""What a run tells while it goes; the command line shows it, by default nobody listens."""

from collections.abc import Callable

from rich.console import Console

from qlora_trainer.base.audit import BaseAudit
from qlora_trainer.data.gate import GateReport


class Reporter:
    """Override what you want to hear."""

    def console(self) -> Console:
        """Where the training loop shows its bar and lines; nowhere unless overridden."""
        return Console(quiet=True)

    def say(self, line: str) -> None:
        """One line for the user."""

    def gate(self, report: GateReport) -> None:
        """The data, once it is encoded."""

    def audit(self, audit: BaseAudit) -> None:
        """The base, once it is loaded."""

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Something long is under way."""


def rows_read(reporter: Reporter) -> Callable[[int], None]:
    """A callback that reports rows as they are encoded."""
    return lambda rows: reporter.progress("encoding rows", rows, None)


def tensors_loaded(reporter: Reporter) -> Callable[[str, int, int], None]:
    """A callback that reports tensors as they are put in their place."""
    return lambda _, number, count: reporter.progress("loading the base", number, count)
