"""Write `scripts/constraints.txt` from what a fresh `.venv` holds; run it with that Python.

The pins are the exact set the tests last passed with on Linux, transitive ones included. A release
that refuses the oldest supported Python carries a marker, so that there pip picks an older one.
"""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().with_name("constraints.txt")
OWN = {"qlora-trainer", "qlora_trainer", "pip", "setuptools", "wheel"}
HEADER = """\
# The versions the tests last passed with (Linux, CPU), transitive ones included.
# Written by: .venv/bin/python scripts/repin.py
"""


def constraint(name: str, version: str, requires_python: str | None) -> str:
    """One line of the file; a local version label (`+cpu`) is a build, not a version.

    >>> constraint("torch", "2.13.0+cpu", ">=3.10")
    'torch==2.13.0'
    >>> constraint("numpy", "2.4.6", ">=3.11")
    'numpy==2.4.6; python_version >= "3.11"'
    """
    pin = f"{name}=={version.split('+')[0]}"
    for clause in (requires_python or "").split(","):
        minimum = clause.strip().removeprefix(">=").strip()
        if clause.strip().startswith(">=3.") and int(minimum.split(".")[1]) > 10:
            return f'{pin}; python_version >= "3.{minimum.split(".")[1]}"'
    return pin


def main() -> int:
    """Write the file."""
    lines = {
        constraint(d.metadata["Name"], d.version, d.metadata.get("Requires-Python"))
        for d in distributions()
        if d.metadata["Name"].lower() not in OWN
    }
    text = HEADER + "".join(line + "\n" for line in sorted(lines, key=str.lower))
    CONSTRAINTS.write_text(text, encoding="utf-8", newline="\n")
    print(f"{CONSTRAINTS}: {len(lines)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
