"""Faults in the user's rows, gathered so that all of them can be mended in one go.

A fault knows where it stands (file and line, or data set and row), what is wrong and the way out.
Reading stops only when there are so many that the file as a whole must be of another kind.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from qlora_trainer.errors import UserError

MAX_FAULTS = 1000  # a file with more is not "a few bad rows", so reading on tells nothing new
SHOWN_PER_KIND = 5  # a thousand faults of one kind must not hide the one of another


_KINDS = {
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def json_kind(value: Any) -> str:
    """What JSON calls a value, with its article.

    >>> json_kind([1])
    'a list'
    """
    return _KINDS.get(type(value), f"of type {type(value).__name__}")


@dataclass(frozen=True)
class Fault:
    """One thing wrong in one place, and what to do about it.

    Attributes:
        where: File and line, or data set and row.
        problem: What is wrong.
        remedy: What to do.
        kind: Faults of one kind are listed together.
        everywhere: It is no row's own: told where it is met first, and not again.
    """

    where: str
    problem: str
    remedy: str
    kind: str = ""
    everywhere: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}; {self.remedy}"


class RowError(Exception):
    """A row that cannot be used; the reader turns it into a `Fault` by adding the place."""

    def __init__(
        self, problem: str, remedy: str, kind: str = "", *, everywhere: bool = False
    ) -> None:
        super().__init__(problem)
        self.problem, self.remedy, self.kind = problem, remedy, kind or problem
        self.everywhere = everywhere

    def at(self, where: str) -> Fault:
        """This error as a fault that stands at `where`."""
        return Fault(where, self.problem, self.remedy, self.kind, self.everywhere)


class TooManyFaults(Exception):
    """Raised by `FaultLog.add` when reading on is pointless."""


@dataclass
class FaultLog:
    """The faults met so far."""

    faults: list[Fault] = field(default_factory=list)
    _told: set[str] = field(default_factory=set)  # kinds that need telling once

    def add(self, fault: Fault) -> None:
        """Keep a fault.

        Raises:
            TooManyFaults: `MAX_FAULTS` are kept; the caller stops reading.
        """
        if fault.everywhere and fault.kind in self._told:
            return
        self._told.update({fault.kind} if fault.everywhere else ())
        self.faults.append(fault)
        if len(self.faults) >= MAX_FAULTS:
            raise TooManyFaults

    def raise_if_any(self, title: str) -> None:
        """Raise one `UserError` that lists the faults, each kind represented.

        Raises:
            UserError: At least one fault was added.
        """
        if not self.faults:
            return
        seen: Counter[str] = Counter()
        first: list[str] = []
        rest: list[str] = []
        for fault in self.faults:
            seen[fault.kind] += 1
            (first if seen[fault.kind] <= SHOWN_PER_KIND else rest).append(str(fault))
        if len(self.faults) >= MAX_FAULTS:
            title += f": stopped reading after {MAX_FAULTS} faults"
        raise UserError.from_faults(title, [*first, *rest], shown=max(20, len(first)))
