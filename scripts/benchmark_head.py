"""A head's product on a CPU in fp32: in strips of the vocabulary, as the loss has it, beside whole.

    python scripts/benchmark_head.py [--json scripts/results/head-fp32.json]
                                     [--repeats 25] [--threads 2]

Random rows and weights in the shapes of real heads (`SHAPES`), each into memory that is there.
Both take turns call by call in one process, so a slow moment of the machine meets both; the ratio
is the median over turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.base.head_product import STRIP_ROWS, head_product

# rows, inputs, outputs
SHAPES: dict[str, tuple[int, int, int]] = {
    "SmolLM2-135M, 256 tokens": (256, 576, 49152),
    "TinyLlama-1.1B, 256 tokens": (256, 2048, 32000),
    "Llama-3.1-8B, 128 tokens": (128, 4096, 128256),
}


def measure(shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Turns of both."""
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator)
    y = torch.empty(rows, outputs)
    calls: tuple[Callable[[], object], ...] = (
        lambda: head_product(y, x, weight, None),
        lambda: torch.mm(x, weight.t(), out=y),
    )
    turns = []
    for number in range(repeats + 1):
        turn = []
        for call in calls:
            began = time.perf_counter()
            call()
            turn.append(time.perf_counter() - began)
        if number:  # the first warms up
            turns.append(turn)
    pairs = [whole / strips for strips, whole in turns]
    return {
        "seconds": {"strips": statistics.median(t[0] for t in turns),
                    "whole": statistics.median(t[1] for t in turns)},
        "times_faster": statistics.median(pairs),
        "quartiles": statistics.quantiles(pairs, n=4)[::2],
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        found[name] = {"shape": shape, **measure(shape, given.repeats)}
        low, high = found[name]["quartiles"]
        print(f"{name}: {found[name]['times_faster']:.2f} ({low:.2f} to {high:.2f}) times as fast")
    if given.json is not None:
        content = {
            "strip_rows": STRIP_ROWS, "threads": given.threads, "repeats": given.repeats,
            "shapes": found,
        }  # fmt: skip
        given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
