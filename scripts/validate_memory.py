"""Hold the memory simulator to peaks that other people measured on real GPUs.

    python scripts/validate_memory.py tests/memory/measurements/t4_peft_training_steps.csv
    python scripts/validate_memory.py FILE.csv --json out.json --rows 0,3

Each row of the file is a training run with every setting; `scripts/peft_recipe.py` simulates that
very recipe (library behaviour included) in a process of its own, and this script prints predicted
against measured: per row, mean, worst, and the worst under-prediction. Nothing is fitted.

A row that the recipe does not cover (another optimizer, card, family, quantization) is named with
its reason, stands in the JSON with `error`, counts in no mean, and the script leaves with 1.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measured_rows import NotCovered, measured_of, request_for

WORKER = Path(__file__).resolve().with_name("peft_recipe.py")


class Simulators:
    """Worker processes, one per thread that asks."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._all: list[subprocess.Popen[str]] = []

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Simulate one recipe."""
        worker = getattr(self._local, "worker", None)
        if worker is None:
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            worker = subprocess.Popen(
                [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, env=environment,
            )  # fmt: skip
            self._local.worker = worker
            self._all.append(worker)
        worker.stdin.write(json.dumps(request) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        if not line:  # killed, such as by the system for want of memory
            del self._local.worker
            return {"error": "the simulating process ended; see above"}
        return dict(json.loads(line))

    def of_row(self, row: dict[str, str]) -> dict[str, Any]:
        """Simulate a row, or say in `error` why not."""
        try:
            return self.ask(request_for(row))
        except NotCovered as fault:
            return {"error": str(fault)}

    def close(self) -> None:
        """End the workers by closing what they read."""
        for worker in self._all:
            assert worker.stdin is not None
            worker.stdin.close()
            worker.wait()


def result_of(row: dict[str, str], predicted: dict[str, Any]) -> dict[str, Any]:
    """The row's columns, with predicted and measured bytes beside them."""
    result: dict[str, Any] = dict(row)
    if "error" in predicted:
        empty = {f"{way}_{name}_bytes": None for name in ("allocated", "reserved")
                 for way in ("predicted", "measured")}  # fmt: skip
        return result | empty | {"error": predicted["error"]}
    for name, bytes_ in measured_of(row).items():
        result[f"predicted_{name}_bytes"] = predicted[name]
        result[f"measured_{name}_bytes"] = round(bytes_)
    for name in ("allocated", "reserved"):
        result.setdefault(f"predicted_{name}_bytes", predicted[name])
        result.setdefault(f"measured_{name}_bytes", None)
    result["kernels"] = predicted["kernels"]
    return result


def errors_of(results: list[dict[str, Any]], name: str) -> list[float]:
    """Relative errors (predicted / measured - 1) of the rows that have a measurement."""
    return [
        r[f"predicted_{name}_bytes"] / r[f"measured_{name}_bytes"] - 1
        for r in results
        if r.get(f"measured_{name}_bytes")
    ]


def summarize(results: list[dict[str, Any]]) -> dict[str, float | None]:
    """Mean, worst and worst under-prediction, as fractions."""
    summary: dict[str, float | None] = {}
    names = ("allocated", "reserved", "after_load", "forward", "backward", "optimizer", "steady")
    for name in names:
        errors = errors_of(results, name)
        if not errors and name not in ("allocated", "reserved"):
            continue
        sizes = [abs(e) for e in errors]
        summary[f"{name}_mean_abs_error"] = sum(sizes) / len(sizes) if sizes else None
        summary[f"{name}_worst_error"] = max(sizes) if sizes else None
        summary[f"{name}_worst_under"] = min([0.0, *errors]) if errors else None
    return summary


def _label(row: dict[str, str]) -> str:
    model = row.get("model_id") or row.get("model") or ""
    keys = ("recipe", "method", "quantization", "attn", "batch_size", "micro_batch_size", "seq_len")
    return " ".join([model.split("/")[-1][:24], *(row[k] for k in keys if row.get(k))])


def _print(results: list[dict[str, Any]], summary: dict[str, float | None]) -> None:
    for number, result in enumerate(results):
        parts = []
        if "error" in result:
            parts.append(f"NOT SIMULATED: {result['error']}")
        for key in result:
            if key.startswith("predicted_") and result.get("measured_" + key[10:]):
                error = result[key] / result["measured_" + key[10:]] - 1
                parts.append(f"{key[10:].removesuffix('_bytes')} {error:+.3%}")
        print(f"{number:3d} {_label(result):62s} {'  '.join(parts)}")
    for name in ("allocated", "reserved", "after_load", "forward", "backward", "optimizer"):
        mean, worst = summary.get(f"{name}_mean_abs_error"), summary.get(f"{name}_worst_error")
        if mean is not None and worst is not None:
            under = summary[f"{name}_worst_under"] or 0.0
            print(f"{name:11s} mean {mean:.3%}  worst {worst:.3%}  worst under {under:+.3%}")


def main() -> int:
    """Simulate the rows, print the errors, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path, help="measured rows")
    parser.add_argument("--json", type=Path, help="write rows and summary here")
    parser.add_argument("--rows", help="only these, counted from 0: 0,3,5")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    try:
        with arguments.csv.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        parser.error(f"{arguments.csv}: {error.strerror}")
    if arguments.rows:
        rows = [rows[int(number)] for number in arguments.rows.split(",")]
    simulators = Simulators()
    try:
        with ThreadPoolExecutor(arguments.processes) as pool:
            found = list(pool.map(simulators.of_row, rows))
    finally:
        simulators.close()
    results = [result_of(row, answer) for row, answer in zip(rows, found, strict=True)]
    summary = summarize(results)
    _print(results, summary)
    if arguments.json:
        document = {"rows": results, "summary": summary}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if any("error" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
