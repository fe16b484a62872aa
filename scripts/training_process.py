"""A training process seen from outside: started, watched through the files it writes, compared.

What `exact_resume.py` and `chaos.py` share. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ADAPTER = Path("adapter") / "adapter_model.safetensors"
_STATE = re.compile(r"step-(\d{8,})")


def train_command(run_file: Path, overrides: Sequence[str] = ()) -> list[str]:
    """The words that train a run file in a process of its own."""
    command = [sys.executable, "-m", "qlora_trainer", "train", str(run_file)]
    for override in overrides:
        command += ["--set", override]
    return command


def start(
    command: Sequence[str],
    *,
    said: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a training process, quietly.

    Args:
        command: Its words.
        said: File its words are appended to; without one they are lost.
        environment: All of its variables; without, ours.
    """
    if said is None:
        silent = subprocess.DEVNULL
        return subprocess.Popen(command, stdout=silent, stderr=silent, env=environment)
    with said.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Whole lines of the metrics; a line cut by a kill does not count."""
    records = []
    try:
        content = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in content.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def metrics_written(folder: Path) -> bytes:
    """The metrics as they stand; nothing without any."""
    file = folder / "metrics.jsonl"
    return file.read_bytes() if file.is_file() else b""


def steps_logged(folder: Path) -> int:
    """Last step in the metrics, 0 without any."""
    return next((int(r["step"]) for r in reversed(metrics_of(folder)) if "step" in r), 0)


def last_step_seconds(folder: Path) -> float:
    """How long the last logged step took."""
    found = (float(r["seconds"]) for r in reversed(metrics_of(folder)) if "seconds" in r)
    return next(found, 1.0)


def memory_growth(folder: Path) -> dict[str, float] | None:
    """How a run's resident memory went: in its second quarter, in its last, and the growth.

    None of a run shorter than eight steps.
    """
    sizes = [r["memory_bytes"] for r in metrics_of(folder) if "memory_bytes" in r]
    quarter = len(sizes) // 4
    if quarter < 2:
        return None
    early = sum(sizes[quarter : 2 * quarter]) / quarter
    late = sum(sizes[-quarter:]) / quarter
    return {
        "steps": len(sizes), "second_quarter_bytes": early, "last_quarter_bytes": late,
        "growth": late / early - 1,
    }  # fmt: skip


def saved_states(folder: Path) -> list[Path]:
    """Saved states of a run folder, oldest first."""
    found = [path for path in (folder / "states").glob("step-*") if path.is_dir()]
    return sorted(path for path in found if _STATE.fullmatch(path.name))


def step_of(state: Path) -> int:
    """The step a saved state is of."""
    return int(state.name.removeprefix("step-"))


def newest_whole_step(folder: Path) -> int:
    """Step of the newest state whose files are what its manifest says; 0 without one."""
    for state in reversed(saved_states(folder)):
        try:
            manifest = json.loads((state / "manifest.json").read_text(encoding="utf-8"))
            digests = {name: (e["bytes"], e["sha256"]) for name, e in manifest.items()}
            contents = {name: (state / name).read_bytes() for name in digests}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
        found = {n: (len(c), hashlib.sha256(c).hexdigest()) for n, c in contents.items()}
        if found == digests:
            return step_of(state)
    return 0


def bits_different(one: bytes, other: bytes) -> int:
    r"""Bits that differ; where one is longer, all of its surplus.

    >>> bits_different(b"\x00\x0f", b"\x00\x0e"), bits_different(b"ab", b"a")
    (1, 8)
    """
    surplus = 8 * abs(len(one) - len(other))
    size = min(len(one), len(other))
    first, second = int.from_bytes(one[:size], "big"), int.from_bytes(other[:size], "big")
    return surplus + bin(first ^ second).count("1")


def remove_run(folder: Path) -> None:
    """Remove what an earlier run left, if it is a run folder."""
    if (folder / ".qlora-run").is_file():
        shutil.rmtree(folder)
