"""How every script here runs another program: say what is done, do it, stop at the first failure.

Standard library only: these scripts run before anything is installed.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


class Stop(Exception):
    """A step failed; the message says which one and what to do."""


def say(text: str) -> None:
    """Print a line at once, so that it stands before the output of the program it announces."""
    print(text, flush=True)


def run_step(
    what: str,
    command: Sequence[str | Path],
    *,
    advice: str = "",
    environment: Mapping[str, str] | None = None,
    folder: Path = REPOSITORY,
) -> float:
    """Run one program in the repository's root and return the seconds it took.

    Args:
        what: The step in plain words, printed first.
        command: Program and arguments; never a shell line.
        advice: What to do when it fails.
        environment: Variables set on top of ours.
        folder: Where the program runs.

    Raises:
        Stop: The program is missing, or its exit code is not 0.
    """
    words = [str(word) for word in command]
    say(f"\n== {what}")
    began = time.monotonic()
    try:
        code = subprocess.run(
            words, cwd=folder, env={**os.environ, **(environment or {})}, check=False
        ).returncode
    except OSError as error:
        raise Stop(f"{what}: {words[0]} could not be started ({error}). {advice}".strip()) from None
    seconds = time.monotonic() - began
    if code != 0:
        raise Stop(
            f"{what}: failed with exit code {code}; its own output is above.\n"
            f"The command was: {shlex.join(words)}\n{advice}".rstrip()
        )
    say(f"   done in {seconds_in_words(seconds)}")
    return seconds


def seconds_in_words(seconds: float) -> str:
    """Write a duration for people: `4.2 s`, `3 min 05 s`.

    >>> seconds_in_words(4.24), seconds_in_words(185.0)
    ('4.2 s', '3 min 05 s')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def stop_with_message(error: Stop) -> int:
    """Print why a script stopped; the value is its exit code."""
    sys.stdout.flush()
    print(f"\nSTOPPED: {error}", file=sys.stderr, flush=True)
    return 1
