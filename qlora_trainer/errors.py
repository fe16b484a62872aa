"""The one exception a user is meant to read: what was given, the rule it breaks, the way out.

The command line prints it without a traceback and leaves with exit code 2. Anything else that
escapes is a defect of ours and keeps its traceback.
"""

from collections.abc import Sequence


class UserError(Exception):
    """A fault in what the user gave: a setting, a file, a model or the machine."""

    @classmethod
    def from_faults(cls, title: str, faults: Sequence[str], *, shown: int = 20) -> "UserError":
        """One error for many faults, so that all can be mended in one go.

        Args:
            title: What was being checked; the first line of the message.
            faults: One line each, already naming file, row or setting.
            shown: At most this many are listed; the rest are counted.
        """
        lines = [f"  - {fault}" for fault in faults[:shown]]
        if len(faults) > shown:
            lines.append(f"  ... and {len(faults) - shown} more")
        return cls("\n".join([f"{title} ({len(faults)} fault{'s' * (len(faults) != 1)}):", *lines]))


class ToldElsewhereError(UserError):
    """A fault that the main process of several tells; the others leave without a word."""


def first_line(error: BaseException) -> str:
    """Of what an error says; its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
