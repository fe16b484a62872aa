"""Measured training recipes of PEFT + bitsandbytes, run on weightless tensors.

Runs in a process of its own (`validate_memory.py` starts it): other people's library code must be
steered here, which the package never does. What is steered stands in `peft_recipes/steer.py`, the
recipes with their sources in `peft_recipes/t4.py` and `peft_recipes/published.py`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from peft_recipes.published import run_a100, run_l40s
from peft_recipes.recipe import Recipe
from peft_recipes.steer import steer
from peft_recipes.t4 import run_t4

RECIPES = {"t4": run_t4, "a100": run_a100, "l40s": run_l40s}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Simulate one recipe and replay it at a capacity."""
    recipe = Recipe(**request["recipe"])
    trace = RECIPES[request.get("kind", "t4")](recipe)
    peaks = trace.replay(request.get("capacity_bytes"))
    return {
        "allocated": peaks.allocated_bytes,
        "reserved": peaks.reserved_bytes,
        "after_load": peaks.after_phase["load"],
        "forward": peaks.allocated_by_phase["phased forward"],
        "backward": peaks.allocated_by_phase["phased backward"],
        "optimizer": peaks.allocated_by_phase["phased optimizer"],
        "steady": peaks.after_phase.get("measured steady"),
        "by_component": peaks.by_component,
        "reserved_by_phase": peaks.reserved_by_phase,
        "peak_phase": peaks.peak_phase,
        "kernels": trace.log.kernels,
        "retries": peaks.retries,
        "fits": peaks.fits,
    }


def main() -> None:
    """Read recipes as lines of JSON on stdin, write what the replays found as lines on stdout."""
    replies = sys.stdout
    sys.stdout = sys.stderr  # libraries print
    steer()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
