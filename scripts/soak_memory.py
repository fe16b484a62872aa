"""Whether the trainer's memory grows: a long run of a real model, its resident memory step by step.

    .venv/bin/python scripts/soak_memory.py RUN.yaml --json FILE [--set ...]

The math library (oneDNN) keeps what it compiled for each shape of a batch, up to a number of its
own; that is no leak, and ends. So two figures: the mean of the last quarter of the steps over that
of the second, by when the common lengths have been seen; and the growth over the steps whose
batch was as long as an earlier one's, of which nothing new has to be kept. A leak of ours would
show in both.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training_process import memory_growth, metrics_of, start, train_command


def growth_at_known_lengths(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Growth from each step to the next, where the next one's length was seen before.

    >>> lines = [{"tokens": t, "memory_bytes": m} for t, m in [(5, 10), (6, 19), (5, 20)]]
    >>> growth_at_known_lengths(lines)
    {'steps': 1, 'bytes_per_step': 1.0}
    """
    seen, grown = set(), []
    for before, line in zip((None, *lines), lines, strict=False):
        if before is not None and line["tokens"] in seen:
            grown.append(line["memory_bytes"] - before["memory_bytes"])
        seen.add(line["tokens"])
    return {"steps": len(grown), "bytes_per_step": sum(grown) / max(1, len(grown))}


def main() -> int:
    """Command line: one run, its growth as JSON."""
    parser = argparse.ArgumentParser(description="Does the trainer's memory grow?")
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(prefix="qlora-memory-") as made:
        folder, said = Path(made, "run"), Path(made, "said.txt")
        # One row a pass: its tokens are its length.
        changes = [*arguments.overrides, f"output.folder={folder}", f"data.cache_folder={made}/c",
                   "train.micro_batch_size=1", "train.gradient_accumulation_steps=1"]  # fmt: skip
        if start(train_command(arguments.run_file, changes), said=said).wait() != 0:
            raise SystemExit(f"the run failed:\n{said.read_text()[-3000:]}")
        lines = [line for line in metrics_of(folder) if line["kind"] == "train"]
        report = {
            "lengths": len({line["tokens"] for line in lines}),
            "after_warm_up": memory_growth(folder),
            "at_known_lengths": growth_at_known_lengths(lines),
            "memory_bytes": [line["memory_bytes"] for line in lines],
        }
    arguments.json.write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(json.dumps({key: report[key] for key in report if key != "memory_bytes"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
