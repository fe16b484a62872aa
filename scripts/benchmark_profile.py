"""How long `qlora profile` takes and what host memory: one configuration, a large one, a sweep.

    python scripts/benchmark_profile.py [--json scripts/results/profile.json]

Each is a process of its own, timed from its start to its end, imports included; the machine's load
before each is written down. Peak memory is
the resident set of the process and of all it started, summed every 20 ms: pages that forked
workers share are counted once for each, so that what is said is never too little. "Cold" means a
new process; the files it reads may be in the system's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
MODELS = REPOSITORY / "profiles" / "models"
SWEEP = ("train.micro_batch_size=1,2,4,8", "data.max_seq_len=512,1024,2048,3072,4096")
RUNS = {  # name -> (configurations, arguments)
    "7b": (1, ("--model", str(MODELS / "llama-2-7b.json"), "--gpu", "rtx-4060-8gb")),
    "70b": (1, ("--model", str(MODELS / "llama-3.3-70b.json"), "--gpu", "rtx-a6000-48gb")),
    "7b-sweep": (
        20,
        ("--model", str(MODELS / "llama-2-7b.json"), "--gpu", "rtx-3060-12gb", "--sweep", *SWEEP),
    ),
}


def resident_bytes(process: psutil.Process) -> int:
    """Of a process and all below it."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def measure(arguments: tuple[str, ...]) -> dict[str, Any]:
    """Run `qlora profile` once.

    Raises:
        RuntimeError: It failed.
    """
    command = [sys.executable, "-m", "qlora_trainer", "profile", "--json", *arguments]
    highest, begun = 0, time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
        watched = psutil.Process(running.pid)
        while running.poll() is None:
            try:
                highest = max(highest, resident_bytes(watched))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.02)
        code = running.wait()
    seconds = time.perf_counter() - begun
    if code not in (0, 3, 4):  # fits, tight, does not fit
        raise RuntimeError(f"{' '.join(command)} left with {code}")
    return {"seconds": round(seconds, 2), "peak_resident_bytes": highest, "exit_code": code}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Time `qlora profile`.")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--only", nargs="+", choices=sorted(RUNS), help="only these")
    arguments = parser.parse_args()
    found = {}
    for name in arguments.only or RUNS:
        configurations, told = RUNS[name]
        load = os.getloadavg()[0]
        found[name] = {"configurations": configurations, "load_before": load, **measure(told)}
        size = found[name]["peak_resident_bytes"] / 2**20
        print(f"{name}: {found[name]['seconds']} s, {size:.0f} MiB", flush=True)
    machine = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "bitsandbytes")},
    }
    if arguments.json:
        text = json.dumps({"machine": machine, "runs": found}, indent=1) + "\n"
        arguments.json.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
