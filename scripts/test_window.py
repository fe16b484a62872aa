"""Test both ends of the window of dependencies that pyproject.toml allows.

    python scripts/test_window.py oldest|newest [--json FILE] [--tests PATH ...] [--place FOLDER]

`oldest` pins every dependency of the package (not of its extras) to the lower end of its range;
`newest` lets pip choose. Each end gets a virtual environment of its own (in `.cache/window/`), the
package, and the tests named; a deprecation that one dependency sees in another is no failure there,
as for a user. An end that cannot be installed here (no wheels for this Python or machine) is said,
with pip's words, and is no pass. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from environment import venv_python
from steps import REPOSITORY, Stop, run_step, say, stop_with_message

PLACE = REPOSITORY / ".cache" / "window"
CONSTRAINTS = REPOSITORY / "scripts" / "constraints.txt"
# A few tests through every room that leans on a dependency.
TESTS = (
    "tests/test_releases.py", "tests/base/test_quantize.py", "tests/base/test_load.py",
    "tests/data/test_template.py", "tests/data/test_files.py", "tests/lora/test_files.py",
    "tests/training/test_state.py",
)  # fmt: skip
TOOLS = ("pytest", "hypothesis", "peft", "seqeval")  # pinned as tested: not what is tried here
_RANGE = re.compile(r"([A-Za-z0-9_.-]+)\s*>=\s*([^,;\s]+)")


def lower_ends(requirements: Sequence[str]) -> dict[str, str]:
    """Package -> the oldest version its range allows.

    >>> lower_ends(["torch>=2.13,<2.15", "psutil>=5.9"])
    {'torch': '2.13', 'psutil': '5.9'}
    """
    matches = [(text, _RANGE.match(text)) for text in requirements]
    unbounded = [text for text, match in matches if match is None]
    if unbounded:
        raise Stop(f"pyproject.toml: {', '.join(unbounded)} has no lower end (>=)")
    return {match.group(1): match.group(2) for _, match in matches if match}


def pins(end: str) -> list[str]:
    """Constraint lines of one end: the oldest dependencies, and the tools as tested."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = lower_ends(project["dependencies"])
    tested = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    tools = [line for line in tested if line.partition("==")[0].lower() in TOOLS]
    # Of the oldest minor release its last patch: the first one may lack a wheel.
    lines = [f"{name}=={version}.*" for name, version in oldest.items()] if end == "oldest" else []
    return [*lines, *tools]


def versions(python: Path) -> dict[str, str]:
    """What an environment holds."""
    command = [str(python), "-m", "pip", "list", "--format", "json"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {entry["name"]: entry["version"] for entry in json.loads(listed)}


def install(end: str, place: Path) -> Path:
    """An environment with one end of the window; its interpreter.

    Raises:
        Stop: It cannot be had here.
    """
    venv = place / end
    place.mkdir(parents=True, exist_ok=True)
    constraints = place / f"{end}.txt"
    constraints.write_text("\n".join(pins(end)) + "\n", encoding="utf-8")
    run_step(f"Making {venv}", [sys.executable, "-m", "venv", "--clear", venv])
    python = venv_python(venv)
    run_step(
        f"Installing the {end} versions allowed",
        [python, "-m", "pip", "install", "--quiet", "--no-input", "--no-compile", "--editable",
         REPOSITORY, *TOOLS, "--constraint", constraints],
        advice="pip names above what has no wheel here or what contradicts what.",
    )  # fmt: skip
    return python


def main() -> int:
    """Command line: one end, installed and tested."""
    parser = argparse.ArgumentParser(description="Test one end of the dependency window.")
    parser.add_argument("end", choices=("oldest", "newest"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--place", type=Path, default=PLACE, help="of the environments; 6 GB each")
    parser.add_argument("--tests", nargs="+", default=list(TESTS))
    arguments = parser.parse_args()
    report: dict[str, Any] = {"end": arguments.end, "tests": arguments.tests, "passed": False}
    began = time.monotonic()
    try:
        python = install(arguments.end, arguments.place)
        report["versions"] = versions(python)
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning"]
        tests = [python, "-m", "pytest", *options, *arguments.tests]
        run_step("Tests", tests, environment=offline)
        report["passed"] = True
    except Stop as error:
        report["stopped"] = str(error)
        return stop_with_message(error)
    finally:
        report["seconds"] = time.monotonic() - began
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    say(f"The {arguments.end} end of the window passes.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
