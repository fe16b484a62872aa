"""Kill a training process again and again, resume it, and count the bits that differ at the end.

    .venv/bin/python scripts/exact_resume.py RUN.yaml --json FILE [--kills N] [--set ...]

One run is left alone. Its twin is killed (SIGKILL; on Windows TerminateProcess): each time it has
gone at least one step further, at a random moment within the next two steps, so while loading the
next batch, computing, or saving. Then both adapters are compared byte by byte. Standard library
only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from training_process import (
    ADAPTER,
    bits_different,
    last_step_seconds,
    remove_run,
    start,
    steps_logged,
    train_command,
)

SLOWEST_STEP_SECONDS = 600.0


def kill_and_resume(command: list[str], folder: Path, *, kills: int, seed: int) -> dict[str, Any]:
    """Run a command to its end, killing it on the way.

    Returns:
        How many kills hit a running process, after which step each, and the seconds in all.
    """
    chance = random.Random(seed)
    killed_after: list[int] = []
    step_seconds = 1.0
    began = time.monotonic()
    while True:
        before, process, struck = steps_logged(folder), start(command), False
        while process.poll() is None and len(killed_after) < kills:
            if steps_logged(folder) > before:
                time.sleep(chance.uniform(0, 2 * step_seconds))
                if process.poll() is None:
                    process.kill()
                    struck = True
                break
            if time.monotonic() - began > SLOWEST_STEP_SECONDS * (kills + 1):
                process.kill()
                raise SystemExit("the run makes no progress; look at it without kills first")
            time.sleep(0.02)
        code = process.wait()
        if code == 0:
            break
        if not struck or code not in (-9, 1):
            raise SystemExit(f"the run ended by itself with exit code {code}")
        killed_after.append(steps_logged(folder))
        step_seconds = last_step_seconds(folder)
    return {
        "kills": len(killed_after),
        "killed_after_step": killed_after,
        "seconds": time.monotonic() - began,
    }


def main() -> int:
    """Command line: both runs, the comparison as JSON."""
    parser = argparse.ArgumentParser(description="Kill, resume, compare.")
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    command = train_command(arguments.run_file, arguments.overrides)
    folders = {name: Path("runs") / f"exact-resume-{name}" for name in ("alone", "killed")}

    def as_run(name: str) -> list[str]:
        return [*command, "--set", f"output.folder={folders[name]}"]

    print("Training without interruption ...", flush=True)
    began = time.monotonic()
    subprocess.run([*as_run("alone"), "--restart"], check=True, stdout=subprocess.DEVNULL)
    alone_seconds = time.monotonic() - began
    print(f"Training the same with {arguments.kills} kills ...", flush=True)
    remove_run(folders["killed"])
    report = kill_and_resume(
        as_run("killed"), folders["killed"], kills=arguments.kills, seed=arguments.seed
    )
    contents = [(folder / ADAPTER).read_bytes() for folder in folders.values()]
    report["bits_different"] = bits_different(*contents)
    report["bits_compared"] = 8 * len(contents[0])
    report["seconds_without_kills"] = alone_seconds
    arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{report['kills']} kills, {report['bits_different']} bits different", flush=True)
    return 0 if report["bits_different"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
