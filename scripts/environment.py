"""Make `.venv` and install the package in it, with the pinned set of `scripts/constraints.txt`.

    python scripts/environment.py [--extras dev]

torch comes first, alone: it is nine tenths of the download, and when it cannot be had nothing else
is worth waiting for. A stamp inside `.venv` holds the hash of what was asked for; as long as it
holds, the next run returns at once. The stamp is written last, so a `.venv` left half-made by an
interrupted run is repaired, never trusted. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from steps import REPOSITORY, Stop, run_step, say, stop_with_message

VENV = REPOSITORY / ".venv"
CONSTRAINTS = REPOSITORY / "scripts" / "constraints.txt"
OLDEST_PYTHON = (3, 11)  # as in pyproject.toml
# Extras that bring other extras along.
CONTAINED = {"dev": frozenset({"gguf", "tensorboard", "wandb"})}


def venv_python(venv: Path = VENV) -> Path:
    """The interpreter of a virtual environment, on this operating system."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def pinned_version(package: str, constraints: str) -> str:
    r"""The version a constraints file pins a package to.

    >>> pinned_version("torch", "torch==2.13.0\n")
    '2.13.0'
    """
    for line in constraints.splitlines():
        name, equals, rest = line.partition("==")
        if equals and name.strip().lower() == package.lower():
            return rest.split(";")[0].strip()
    raise Stop(f"scripts/constraints.txt pins no {package}; restore the file.")


def request_digest(root: Path = REPOSITORY) -> str:
    """Hash of all that decides what is installed: the requirements, the pins, this Python."""
    digest = hashlib.sha256(repr((sys.version_info[:2], str(root))).encode())
    for name in ("pyproject.toml", "scripts/constraints.txt"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def read_stamp(venv: Path) -> tuple[str, frozenset[str]]:
    """Digest and extras of the last finished install; empty when there is none to trust."""
    try:
        stamp = json.loads((venv / "qlora-install.json").read_text(encoding="utf-8"))
        return str(stamp["digest"]), frozenset(stamp["extras"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", frozenset()


def write_stamp(venv: Path, digest: str, extras: Iterable[str]) -> None:
    """Record a finished install, in one rename."""
    draft = venv / "qlora-install.json.part"
    draft.write_text(json.dumps({"digest": digest, "extras": sorted(extras)}), encoding="utf-8")
    draft.replace(venv / "qlora-install.json")


def with_contained(extras: frozenset[str]) -> frozenset[str]:
    """These extras and those they bring along."""
    return extras.union(*(CONTAINED.get(extra, frozenset()) for extra in extras))


def has_working_pip(python: Path) -> bool:
    """Whether this interpreter starts and can run pip."""
    try:
        command = [str(python), "-m", "pip", "--version"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def prepare_environment(extras: Iterable[str] = ("dev",)) -> Path:
    """Bring `.venv` to the asked state and return its interpreter.

    Args:
        extras: Extras of the package; those of an earlier install stay.

    Raises:
        Stop: Python is too old, or venv or pip failed.
    """
    if sys.version_info < OLDEST_PYTHON:
        raise Stop(
            f"Python {sys.version.split()[0]} is too old: the package needs "
            f"{OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer. Run this script with a newer python."
        )
    digest = request_digest()
    old_digest, old_extras = read_stamp(VENV)
    wanted = frozenset(extras)
    python = venv_python()
    if old_digest == digest and wanted <= with_contained(old_extras) and has_working_pip(python):
        say(f"Environment: {VENV} is up to date.")
        return python

    wanted |= old_extras
    if not has_working_pip(python):
        run_step(
            f"Making the virtual environment {VENV}",
            [sys.executable, "-m", "venv", "--clear", VENV],
            advice="On Debian and Ubuntu: apt install python3-venv",
        )
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    torch = "torch==" + pinned_version("torch", CONSTRAINTS.read_text(encoding="utf-8"))
    advice = "Check the network and the disk, then run the same command again: pip continues."
    run_step(
        f"Installing {torch} (the largest download, some minutes)",
        [*pip, torch, "--constraint", CONSTRAINTS],
        advice=advice,
    )
    names = ",".join(sorted(wanted))
    package = f"{REPOSITORY}[{names}]" if names else str(REPOSITORY)
    run_step(
        f"Installing qlora-trainer[{names}] with the tested versions",
        [*pip, "--editable", package, "--constraint", CONSTRAINTS],
        advice=advice,
    )
    write_stamp(VENV, digest, wanted)
    return python


def main() -> int:
    """Command line: make or repair `.venv`."""
    parser = argparse.ArgumentParser(description="Make .venv and install the package in it.")
    parser.add_argument("--extras", default="dev", help="comma-separated (default: dev)")
    arguments = parser.parse_args()
    try:
        python = prepare_environment(filter(None, arguments.extras.split(",")))
    except Stop as error:
        return stop_with_message(error)
    say(f"Python of the environment: {python}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
