"""What the main job must show, measured; the README's table is made from the file this writes.

    python scripts/benchmark_quickstart.py --json FILE [--parts quickstart,peft,...]

    quickstart  a fresh clone of this commit, `scripts/quickstart.py` in it: the time of install and
                of the rest, held-out loss, and accuracy on the film reviews before and after
    peft        the same run with PEFT (`peft_twin.py`)
    fp32        the same run with fp32 adapters instead of bf16 ones
    alpaca      held-out loss on instructions in Alpaca format, ours and PEFT
    resume      kills survived, and bits that differ from a run left alone (`exact_resume.py`)
    bad-inputs  kinds of bad run files and data tried, each a test with the message it gets

Parts not named keep the figures the file already has. Half an hour on 2 quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from assets import prepare_assets
from environment import prepare_environment
from steps import REPOSITORY, Stop, run_step, say, seconds_in_words, stop_with_message

QUICKSTART = Path("profiles") / "quickstart.yaml"
ALPACA = Path("profiles") / "alpaca-cpu.yaml"
RUNS = REPOSITORY / "runs" / "benchmark"
SETTINGS = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# A step of seconds, so that many kills cost little; everything else as in the quickstart.
SHORT_STEPS = [
    "train.max_steps=24",
    "train.micro_batch_size=4",
    "adapter.dropout=0.1",
    "evaluation.max_rows=16",
    "output.save_every_steps=1",
]


def measure_quickstart(python: Path) -> dict[str, Any]:
    """The user's way: clone, run the one command; uncommitted changes are not in it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        clone = Path(scratch) / "qlora_trainer"
        run_step("Cloning this commit", ["git", "clone", "--quiet", REPOSITORY, clone])
        run_step(
            "The quickstart in the clone", [sys.executable, "scripts/quickstart.py"], folder=clone
        )
        run = clone / "runs" / "quickstart"
        seconds = read_json(run / "quickstart-seconds.json")
        return {
            "seconds": seconds,
            "seconds_after_install": sum(seconds.values()) - seconds["install"],
            **training_figures(run),
            "film_reviews": read_json(run / "film-reviews.json"),
        }


def measure_peft(python: Path) -> dict[str, Any]:
    """The quickstart's run with PEFT."""
    return run_peft(python, QUICKSTART, "peft-film-reviews", "--film-reviews")


def measure_fp32(python: Path) -> dict[str, Any]:
    """The quickstart's run with fp32 adapters."""
    return run_ours(python, QUICKSTART, "fp32-adapters", "adapter.dtype=fp32")


def measure_alpaca(python: Path) -> dict[str, Any]:
    """Instructions in Alpaca format, ours and PEFT."""
    return {
        "ours": run_ours(python, ALPACA, "alpaca"),
        "peft": run_peft(python, ALPACA, "peft-alpaca"),
    }


def measure_resume(python: Path) -> dict[str, Any]:
    """Kills and bits."""
    report = RUNS / "exact-resume.json"
    changes = [word for setting in SHORT_STEPS for word in ("--set", setting)]
    command = [python, "scripts/exact_resume.py", QUICKSTART, "--json", report, *changes]
    run_step("Killing and resuming a run", command, environment=SETTINGS)
    return read_json(report)


def measure_bad_inputs(python: Path) -> dict[str, Any]:
    """Count the table-driven tests of bad run files and bad data, all of which must pass."""
    tables = sorted((REPOSITORY / "tests").glob("*/test_bad_*.py"))
    command = [python, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *tables]
    done = subprocess.run(
        [str(word) for word in command], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    if done.returncode != 0 or passed is None:
        raise Stop(f"bad inputs: the tests failed\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    say(f"\n== Bad inputs: {passed.group(1)} kinds, each with its message")
    return {"kinds": int(passed.group(1)), "files": [path.name for path in tables]}


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "quickstart": measure_quickstart,
    "peft": measure_peft,
    "fp32": measure_fp32,
    "alpaca": measure_alpaca,
    "resume": measure_resume,
    "bad-inputs": measure_bad_inputs,
}


def run_ours(python: Path, run_file: Path, name: str, *overrides: str) -> dict[str, Any]:
    """One `qlora train` of its own, anew."""
    folder = RUNS / name
    command = [python, "-m", "qlora_trainer", "train", run_file, "--restart"]
    for override in (*overrides, f"output.folder={folder}"):
        command += ["--set", override]
    seconds = run_step(f"Training {name}", command, environment=SETTINGS)
    return {**training_figures(folder), "seconds": seconds}


def run_peft(python: Path, run_file: Path, name: str, *flags: str) -> dict[str, Any]:
    """One run of the PEFT twin."""
    report = RUNS / f"{name}.json"
    command = [python, "scripts/peft_twin.py", run_file, "--json", report, *flags]
    seconds = run_step(f"Training {name}", command, environment=SETTINGS)
    return {**read_json(report), "seconds": seconds}


def training_figures(folder: Path) -> dict[str, Any]:
    """Held-out losses, and the time and loss of every step, of a finished run folder."""
    metrics = read_json(folder / "result.json")["metrics"]
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if line["kind"] == "train"]
    return {
        "loss_before": metrics["loss_before"],
        "loss": metrics["loss"],
        "training_losses": [step["loss"] for step in steps],
        "training_seconds": sum(step["seconds"] for step in steps),
        "tokens": sum(step["tokens"] for step in steps),
    }


def comparisons(report: dict[str, Any]) -> dict[str, float]:
    """Final losses over one another, for the parts that are there; below 1 ours is the better."""
    ratios = {}
    ours = report.get("quickstart", {}).get("loss")
    if ours is not None and "peft" in report:
        ratios["film_reviews_loss_over_peft"] = ours / report["peft"]["loss"]
    if ours is not None and "fp32" in report:
        ratios["bf16_adapter_loss_over_fp32"] = ours / report["fp32"]["loss"]
    if "alpaca" in report:
        alpaca = report["alpaca"]
        ratios["alpaca_loss_over_peft"] = alpaca["ours"]["loss"] / alpaca["peft"]["loss"]
    return ratios


def machine() -> dict[str, Any]:
    """Where the figures come from, without naming the machine."""
    # the file of figures itself has changed as soon as one part is written
    commit = git_says("rev-parse", "--short=12", "HEAD")
    changed = git_says("status", "--porcelain", "-uno", "--", ".", ":!scripts/results")
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "commit": commit + ("-dirty" if changed else ""),
    }


def git_says(*words: str) -> str:
    """What git answers in this repository."""
    done = subprocess.run(
        ["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def main() -> int:
    """Command line: measure the parts, write the file after each."""
    parser = argparse.ArgumentParser(description="What the main job must show, measured.")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of: {', '.join(PARTS)}")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts: {', '.join(unknown)}: none of {', '.join(PARTS)}")
    report = read_json(arguments.json) if arguments.json.is_file() else {}
    RUNS.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        python = prepare_environment(("dev",))
        prepare_assets(python)
        for part in parts:
            report[part] = PARTS[part](python)
            report["comparisons"] = comparisons(report)
            report["machine"] = machine()
            draft = arguments.json.with_name(arguments.json.name + ".part")
            draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            draft.replace(arguments.json)
    except Stop as error:
        return stop_with_message(error)
    say(f"\n{arguments.json} written in {seconds_in_words(time.monotonic() - began)}")
    say(json.dumps(report["comparisons"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
