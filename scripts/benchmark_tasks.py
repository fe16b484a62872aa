"""Tasks on real models and real data: the metric before and after, beside PEFT with the same steps.

    python scripts/benchmark_tasks.py --json results.json [--only sentiment] [--steps 200]

Ours is a whole run (4-bit base, adapter, head, scored again by a fresh process); PEFT trains the
same base, bit for bit, from the same first values with the same micro-batches in the same order
(`peft_task_twin.py`). Both are scored by the same code on the same rows after the last step: no
best step is chosen on the rows that are reported.
A case whose model or data is not there is skipped, with the reason in the figures; figures of cases
not run, or skipped now, stay in the file, and several processes may write it. The assets come with
`assets.py`, `assets_words.py`, `assets_text.py`, `assets_translation.py` and `assets_images.py`.

No registry has a real encoder-decoder or ResNet inside a package, so those are small and random
(`random_models.py`; the figures say so): they show that both sides learn the same, not how well
such models translate or see.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmark_quickstart import machine
from figures_file import record
from peft_loop import Clock
from peft_task_twin import train_with_peft
from task_cases import CASES, Case, make_inputs, settings_of

from qlora_trainer.config.read import check_values
from qlora_trainer.run.report import Reporter
from qlora_trainer.run.train import train


class Said(Reporter):
    """Shows what is said, so that one sees it is alive."""

    def say(self, line: str) -> None:
        """Show a line."""
        print(f"   {line}", file=sys.stderr)


def ours(run: Any) -> dict[str, Any]:
    """A whole run of this package."""
    clock = Clock()
    result = train(run, reporter=Said())
    return {"metrics": result.metrics, **clock.read()}


def run_case(case: Case, seed: int, steps: int | None) -> dict[str, Any]:
    """Both sides of one case with one seed."""
    with tempfile.TemporaryDirectory(prefix="benchmark-tasks-") as place:
        make_inputs(case, Path(place))
        values = settings_of(case, Path(place), steps)
        values["train"]["seed"] = seed
        run = check_values(values, name=case.task)
        sides = {"seed": seed, "ours": ours(run), "peft": train_with_peft(run)}
    check_that_both_began_alike(sides)
    return sides


def check_that_both_began_alike(run: dict[str, Any]) -> None:
    """Both sides have the same base and first values: so they score the same before any step.

    Raises:
        ValueError: They do not, so what they end with cannot be compared.
    """
    first, second = (run[side]["metrics"]["loss_before"] for side in ("ours", "peft"))
    if abs(first - second) > 1e-3 * abs(first):
        raise ValueError(f"held-out loss before any step: ours {first}, PEFT {second}")


def figures_of(case: Case, steps: int | None) -> dict[str, Any]:
    """What is recorded of a case."""
    runs = [run_case(case, seed, steps) for seed in case.seeds]
    metric = runs[0]["peft"].pop("best_by")
    shown = [metric, *case.also]
    values = settings_of(case, Path(), steps)
    return {
        "task": case.task,
        "model": case.model,
        "weights": case.weights,
        "data": case.data,
        "metric": metric,
        "means": {name: means(runs, name) for name in shown},
        **{
            name: max(run["ours"][name] + run["peft"][name] for run in runs)
            for name in ("seconds", "processor_seconds")
        },
        "trained_share": runs[0]["peft"]["trained_parameters"] / runs[0]["peft"]["parameters"],
        "settings": {name: values[name] for name in ("adapter", "train", "evaluation")},
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "runs": runs,
    }


def means(runs: list[dict[str, Any]], name: str) -> dict[str, float]:
    """A metric before, with ours and with PEFT, over the seeds."""
    sides = {
        "before": ("ours", f"{name}_before"), "ours": ("ours", name), "peft": ("peft", name),
    }  # fmt: skip
    return {
        label: sum(run[side]["metrics"][key] for run in runs) / len(runs)
        for label, (side, key) in sides.items()
    }


def main() -> int:
    """Run the cases and write their figures as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where figures are written")
    parser.add_argument("--only", choices=CASES, action="append", help="only this case")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of each case's own")
    given = parser.parse_args()
    for name in given.only or CASES:
        case = CASES[name]
        if why := case.missing():
            kept = record(given.json, name, {"skipped": why}, [*CASES])
            stay = "; the figures of an earlier run stay" if "skipped" not in kept else ""
            print(f"{name}: skipped, {why}{stay}", flush=True)
            continue
        record(given.json, name, figures := figures_of(case, given.steps), [*CASES])
        for metric, found in figures["means"].items():
            print(f"{name} ({case.weights} base): {metric} {found}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
