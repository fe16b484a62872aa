"""Say what fits where: for each model and card the longest sequence, as run files ready to use.

    python scripts/make_profiles.py [--models NAME ...] [--check N]

For each model of `profiles/models/` and one card of each size, simulates the training step with
default settings (rank 16 on all linear layers, micro-batch 1) at various `data.max_seq_len` until
it stands between the longest length that fits and the next that does not. "Fits" is `qlora
profile`'s word: 5 % of the card stay free. Writes `profiles/runs/CARD/MODEL.yaml`, a run file of
that length, the prediction as JSON beside it, and `scripts/results/fits.json` for the README.
`--check N` changes nothing; it foresees N of the written run files anew and compares. No GPU and
no weights are needed. Needs the package installed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora_trainer.config.read import read_run_file
from qlora_trainer.errors import UserError
from qlora_trainer.memory.border import last_that_fits
from qlora_trainer.memory.foresight import Foresight
from qlora_trainer.memory.gpus import GpuProfile, read_gpu
from qlora_trainer.run.foresee import foresee_run, run_for_model
from qlora_trainer.units import format_bytes

REPOSITORY = Path(__file__).resolve().parents[1]
MODELS = REPOSITORY / "profiles" / "models"
RUNS = REPOSITORY / "profiles" / "runs"
FITS = REPOSITORY / "scripts" / "results" / "fits.json"
CARDS = (
    "rtx-2060-6gb",
    "rtx-4060-8gb",
    "rtx-3060-12gb",
    "rtx-4060-ti-16gb",
    "rtx-3090-24gb",
    "rtx-a6000-48gb",
)
LENGTHS = (
    *range(512, 4096, 512),
    *(quarter * 2**power for power in range(10, 15) for quarter in (4, 5, 6, 7)),
    131072,
)
PREDICTED = (
    "capacity_bytes", "total_bytes", "reserved_bytes", "context_bytes", "allocated_bytes",
    "paged_bytes", "host_bytes", "disk_bytes", "peak_phase", "by_component",
    "trained_parameters", "verdict",
)  # fmt: skip

RUN_FILE = """\
# {model} on a {gpu}: written by scripts/make_profiles.py, foreseen and not measured.
# It takes {total} of {capacity} with nothing else on the card; {card}/{model}.json
# has the parts. Put in your data, then: qlora check {path}
model:
  source: {source}
data:
  train: data/train.jsonl
  max_seq_len: {length}  # {why}
output:
  folder: runs/{model}
"""


def foresee_file(run_file: Path) -> Foresight:
    """What a written run file needs on the card it was written for."""
    source = f"model.source={MODELS / run_file.stem}.json"
    return foresee_run(read_run_file(run_file, [source]), read_gpu(run_file.parent.name))


def foresee_length(model: str, gpu: GpuProfile, length: int) -> Foresight:
    """What default settings need at a length."""
    run = run_for_model(str(MODELS / f"{model}.json"), [f"data.max_seq_len={length}"])
    return foresee_run(run, gpu)


def prediction(foresight: Foresight) -> dict[str, Any]:
    """What the JSON beside a run file says of memory."""
    return {name: getattr(foresight, name) for name in PREDICTED}


def longest(
    model: str, gpu: GpuProfile, lengths: list[int], known: dict[int, int]
) -> tuple[int, Foresight] | None:
    """The longest of the lengths that fits, simulated, with the next one simulated not to.

    Args:
        model: Name of its profile.
        gpu: The card.
        lengths: Ascending.
        known: Length -> bytes needed, of this model on any card: says where to look, not what
            fits. What is simulated here is added.
    """
    found: dict[int, Foresight] = {}

    def fits(index: int) -> bool:
        found[index] = foresee_length(model, gpu, lengths[index])
        known[lengths[index]] = found[index].total_bytes
        return found[index].verdict == "fits"

    def guess(_low: int, _high: int) -> int:
        return _guess(lengths, known, int(0.95 * gpu.usable_bytes))

    last = last_that_fits(len(lengths), fits, guess)
    return (lengths[last], found[last]) if last >= 0 else None


def _guess(lengths: list[int], known: dict[int, int], budget_bytes: int) -> int:
    """Index of the length that a straight line through the two nearest points makes fit."""
    if len(known) < 2:
        return 0 if not known else len(lengths) - 1
    (x, low_bytes), (other, high_bytes) = sorted(
        sorted(known.items(), key=lambda point: abs(point[1] - budget_bytes))[:2]
    )
    slope = max((high_bytes - low_bytes) / (other - x), 1)
    reached = x + (budget_bytes - low_bytes) / slope
    return sum(length <= reached for length in lengths) - 1


def fit_model(model: str) -> dict[str, Any]:
    """One row of the table; writes the model's run files."""
    config = json.loads((MODELS / f"{model}.json").read_text(encoding="utf-8"))
    positions = config["max_position_embeddings"]
    lengths = [length for length in LENGTHS if length <= positions]
    cells: dict[str, int | None] = {}
    row = {"source": config["_name_or_path"], "max_position_embeddings": positions, "cells": cells}
    known: dict[int, int] = {}
    for card in reversed(CARDS):
        (RUNS / card / f"{model}.yaml").unlink(missing_ok=True)
        (RUNS / card / f"{model}.json").unlink(missing_ok=True)
        cells[card] = None
        if not lengths:
            continue  # not even the shortest fits a larger card
        try:
            found = longest(model, read_gpu(card), lengths, known)
        except UserError as error:
            row[f"refused on {card}"] = str(error)
            continue
        if found is None:
            lengths = []
            continue
        cells[card], foresight = found
        lengths = [length for length in lengths if length <= found[0]]
        write_run(model, card, row, foresight, found[0])
        print(f"{model} on {card}: {found[0]}", flush=True)
    return row


def write_run(
    model: str, card: str, row: dict[str, Any], foresight: Foresight, length: int
) -> None:
    """Write a run file and its prediction."""
    (RUNS / card).mkdir(parents=True, exist_ok=True)
    path = RUNS / card / f"{model}.yaml"
    whole = length == row["max_position_embeddings"]
    text = RUN_FILE.format(
        model=model,
        card=card,
        gpu=foresight.gpu,
        total=format_bytes(foresight.total_bytes),
        capacity=format_bytes(foresight.capacity_bytes),
        source=row["source"],
        path=path.relative_to(REPOSITORY),
        length=length,
        why="the model has no more positions" if whole else "the next longer tried does not fit",
    )
    path.write_text(text, encoding="utf-8")
    content = {"gpu": card, "model": row["source"], "max_seq_len": length}
    write_json(
        path.with_suffix(".json"),
        content | {"predicted": prediction(foresight), "versions": versions()},
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that people read too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Of the libraries whose memory is foreseen, whatever device they were built for."""
    names = ("torch", "transformers", "bitsandbytes")
    return {name: version(name).partition("+")[0] for name in names}


def differences(run_file: Path) -> list[str]:
    """Where a run file's prediction is not what is foreseen now."""
    written = json.loads(run_file.with_suffix(".json").read_text(encoding="utf-8"))["predicted"]
    found = json.loads(json.dumps(prediction(foresee_file(run_file))))
    return [
        f"{run_file.parent.name}/{run_file.name}: {name} = {written.get(name)}, now {found[name]}"
        for name in found
        if written.get(name) != found[name]
    ]


def main() -> int:
    """Command line: make all, some, or check a sample."""
    parser = argparse.ArgumentParser(description="Make the run files of profiles/runs.")
    parser.add_argument("--models", nargs="+", help="only these of profiles/models")
    parser.add_argument("--check", type=int, metavar="N", help="foresee N run files anew")
    arguments = parser.parse_args()
    if arguments.check:
        files = sorted(RUNS.glob("*/*.yaml"))
        sample = random.sample(files, min(arguments.check, len(files)))
        wrong = [line for file in sample for line in differences(file)]
        print("\n".join(wrong) or f"{len(sample)} of {len(files)} run files are as foreseen now")
        return 1 if wrong else 0
    every = sorted(path.stem for path in MODELS.glob("*.json"))
    wanted = arguments.models or every
    earlier = json.loads(FITS.read_text(encoding="utf-8"))["rows"] if FITS.is_file() else {}
    with ProcessPoolExecutor(max_workers=2) as pool:
        rows = earlier | dict(zip(wanted, pool.map(fit_model, wanted), strict=True))
    kept = {model: rows[model] for model in every if model in rows}
    write_json(FITS, {"versions": versions(), "cards": list(CARDS), "rows": kept})
    return 0


if __name__ == "__main__":
    sys.exit(main())
