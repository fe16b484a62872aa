"""Run every check that CI runs, on a fresh clone or a used one.

    python scripts/test.py [--fast]

Makes `.venv` and brings the assets first (both return at once when nothing changed), then runs the
checks in the order of how fast they fail. The first failure stops it; the exit code is 0 only when
all passed. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from assets import prepare_assets
from environment import prepare_environment
from steps import Stop, run_step, say, seconds_in_words, stop_with_message

OFFLINE = {
    "HF_HUB_OFFLINE": "1",  # the tests read what is on disk; none may reach for the network
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}


def checks(python: Path, *, fast: bool) -> list[tuple[str, list[str | Path]]]:
    """Name and command of each check, in order."""
    tool: list[str | Path] = [python, "-m"]
    import_linter = python.with_name("lint-imports" + (".exe" if os.name == "nt" else ""))
    tests = [*tool, "pytest", *(["-m", "not slow"] if fast else [])]
    return [
        ("Lint (ruff check)", [*tool, "ruff", "check", "."]),
        ("Formatting (ruff format --check)", [*tool, "ruff", "format", "--check", "."]),
        ("Types (mypy)", [*tool, "mypy"]),
        ("Imports point down only (lint-imports)", [import_linter]),
        ("Tests (pytest, without the slow ones)" if fast else "Tests (pytest, all)", tests),
    ]


def main() -> int:
    """Command line: set up, then every check."""
    parser = argparse.ArgumentParser(description="Run every check that CI runs.")
    parser.add_argument("--fast", action="store_true", help="leave out tests marked slow")
    fast = parser.parse_args().fast
    began = time.monotonic()
    try:
        python = prepare_environment(("dev",))
        prepare_assets(python)
        todo = checks(python, fast=fast)
        for number, (what, command) in enumerate(todo, start=1):
            run_step(f"[{number}/{len(todo)}] {what}", command, environment=OFFLINE)
    except Stop as error:
        return stop_with_message(error)
    say(f"\nAll {len(todo)} checks passed in {seconds_in_words(time.monotonic() - began)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
