"""The run of several processes beside the run of one: how far losses and adapters are apart.

    .venv/bin/python scripts/compare_processes.py RUN.yaml --json FILE [--processes 2] [--set ...]

Three runs of one file: by one process, by several over gloo, and begun by several, asked to stop
(SIGTERM) after a step and ended by one. All have the same global batch; sums are added in
another order, so what is compared is how far the figures are apart, and that each step saw the same
number of tokens. Run on a CPU, whatever the machine has.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from storm import Storm, left
from training_process import ADAPTER, metrics_of, newest_whole_step, train_command


def compare(one: Path, other: Path) -> dict[str, Any]:
    """How far two runs' figures are apart, each relative to the first's."""
    lines = [metrics_of(folder) for folder in (one, other)]
    told = ("kind", "step", "trained_tokens", "tokens", "eval_tokens")
    seen = [[[line.get(key) for key in told] for line in each] for each in lines]
    curves = [[x[k] for x in each for k in ("loss", "eval_loss") if k in x] for each in lines]
    pairs = list(zip(*curves, strict=True))
    ours, theirs = (load_file(folder / ADAPTER) for folder in (one, other))
    if ours.keys() != theirs.keys():
        raise SystemExit(f"{other}: its adapter has other tensors")
    apart = [
        float((value.float() - theirs[name].float()).norm() / value.float().norm())
        for name, value in ours.items()
    ]
    return {
        "losses": len(pairs),
        "largest_loss_difference": max(abs(b - a) / abs(a) for a, b in pairs),
        "tensors": len(apart),
        "largest_adapter_difference": max(apart),
        "same_tokens": seen[0] == seen[1],
    }


def main() -> int:
    """Command line: three runs, two comparisons as JSON."""
    parser = argparse.ArgumentParser(description="Several processes beside one.")
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(prefix="qlora-processes-") as made:
        changes = [*arguments.overrides, "model.device=cpu", f"data.cache_folder={made}/cache"]

        def storm(name: str, processes: int) -> Storm:
            folder, said = Path(made, name), Path(made, f"said-{name}.txt")
            command = train_command(arguments.run_file, [*changes, f"output.folder={folder}"])
            return Storm(
                command, folder, None, None, said, random.Random(0), False, None, processes
            )

        def finished(run: Storm) -> Path:
            if run.finish() != 0:
                raise SystemExit(f"{run.folder.name} failed:\n{run.said.read_text()[-3000:]}")
            print(f"{run.folder.name}: trained", flush=True)
            return run.folder

        alone = finished(storm("alone", 1))
        together = finished(storm("together", arguments.processes))
        shrunk = storm("shrunk", arguments.processes)
        process = shrunk.begin()
        shrunk.go_on(process, 0)
        process.terminate()
        left(process)
        shrunk.settle()
        stopped_after, shrunk.processes = newest_whole_step(shrunk.folder), 1
        report = {
            "processes": arguments.processes,
            "together": compare(alone, together),
            "ended_by_one": {**compare(alone, finished(shrunk)), "stopped_after": stopped_after},
        }
    arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
