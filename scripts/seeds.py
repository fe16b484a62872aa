"""Learning curves over seeds: `qlora train` and the same run with PEFT, and whether they differ.

    .venv/bin/python scripts/seeds.py RUN.yaml --json FILE [--seeds 5] [--set ...]

For each seed both train in processes of their own (`peft_twin.py`): the same rows in the same
order from the same first values, so a seed's two runs are a pair. What is compared is the held-out
loss at the end and the training loss of every step: the mean difference with its 95 % interval
(Student), the exact test of sign flips, and how far seeds alone move a loss.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intervals import mean_interval, sign_flip_p
from training_process import train_command

SCRIPTS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Curve:
    """One run: the training loss of every step, and the held-out loss after the last."""

    losses: list[float]
    held_out: float


def train_ours(run_file: Path, overrides: Sequence[str], place: Path) -> Curve:
    """`qlora train` in a process of its own."""
    changes = [*overrides, f"output.folder={place}"]
    subprocess.run(train_command(run_file, changes), check=True, stdout=subprocess.DEVNULL)
    lines = (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [r["loss"] for r in map(json.loads, lines) if r["kind"] == "train"]
    result = json.loads((place / "result.json").read_text(encoding="utf-8"))
    return Curve(losses, float(result["last_evaluation"]["loss"]))


def train_peft(run_file: Path, overrides: Sequence[str], place: Path) -> Curve:
    """The same run with PEFT in a process of its own."""
    report = place.with_suffix(".json")
    command = [sys.executable, str(SCRIPTS / "peft_twin.py"), str(run_file), "--json", str(report)]
    for override in overrides:
        command += ["--set", override]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    told = json.loads(report.read_text(encoding="utf-8"))
    return Curve([float(loss) for loss in told["training_losses"]], float(told["loss"]))


def compare(ours: Sequence[Curve], theirs: Sequence[Curve]) -> dict[str, Any]:
    """What the pairs of runs say; a difference is ours minus theirs.

    >>> a = [Curve([2.0, 1.0], 0.5), Curve([2.1, 1.1], 0.7)]
    >>> found = compare(a, a)
    >>> found["held_out_difference"]["estimate"], found["held_out_p"], found["steps_apart"]
    (0.0, 1.0, 0)
    """
    pairs = list(zip(ours, theirs, strict=True))
    ends = [one.held_out - other.held_out for one, other in pairs]
    steps = [
        mean_interval([one.losses[step] - other.losses[step] for one, other in pairs])
        for step in range(min(len(curve.losses) for pair in pairs for curve in pair))
    ]
    return {
        "held_out_difference": asdict(mean_interval(ends)),
        "held_out_p": sign_flip_p(ends),
        "held_out_spread_of_seeds": statistics.stdev(curve.held_out for curve in ours),
        "largest_held_out_difference": max(map(abs, ends)),
        "steps": len(steps),
        "steps_apart": sum(not step.low <= 0 <= step.high for step in steps),
        "largest_mean_step_difference": max(abs(step.estimate) for step in steps),
    }


def main() -> int:
    """Command line: all runs, their curves and the comparison as JSON."""
    parser = argparse.ArgumentParser(description="Ours and PEFT over seeds.")
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 11), metavar="2..10")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    ours: list[Curve] = []
    theirs: list[Curve] = []
    with tempfile.TemporaryDirectory(prefix="qlora-seeds-") as made:
        for seed in range(arguments.seeds):
            changes = [*arguments.overrides, f"train.seed={seed}"]
            ours.append(train_ours(arguments.run_file, changes, Path(made, f"ours-{seed}")))
            theirs.append(train_peft(arguments.run_file, changes, Path(made, f"peft-{seed}")))
            ends = f"{ours[-1].held_out:.6f}, PEFT {theirs[-1].held_out:.6f}"
            print(f"seed {seed}: held-out loss {ends}", flush=True)
    report = compare(ours, theirs)
    report |= {"ours": [asdict(c) for c in ours], "peft": [asdict(c) for c in theirs]}
    arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    found = report["held_out_difference"]
    print(
        f"mean difference {found['estimate']:+.6f} ({found['low']:+.6f} to {found['high']:+.6f}), "
        f"sign flips p = {report['held_out_p']:.3f}; seeds alone spread by "
        f"{report['held_out_spread_of_seeds']:.6f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
