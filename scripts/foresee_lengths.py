"""Foresee how little memory one step takes and how long a sequence fits, with no GPU.

    python scripts/foresee_lengths.py [--only NAME ...] [--json scripts/results/lengths.json]

Each case is a model, a card and the settings that save memory (`LEAN`), simulated as `qlora
profile` does it: rank 32 on all linear layers, micro-batch 1; the head in 16 bit, in host memory
but for the loss (`head-here`: on the card). A card's budget is its usable memory
less 0.3 GiB, its CUDA context included. Either a length is given, and what it takes is the answer,
or the longest length is searched: it was simulated, and so was the next one, which does not fit.
Beside each stand the pinned host memory it needs, the bytes that one step moves over PCIe and the
seconds they take at 12 GB/s, were nothing computed meanwhile. Where a bound is missed, the largest
tensors at the peak say what holds it. Unsloth's figures are those it publishes
(https://docs.unsloth.ai/basics/unsloth-benchmarks, rank 32, batch 1, on cards of that size). Cases
done earlier are kept in the file. Needs the package installed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from make_profiles import MODELS, versions, write_json

from qlora_trainer.memory.border import last_that_fits
from qlora_trainer.memory.foresight import Foresight
from qlora_trainer.memory.gpus import GpuProfile, read_gpu
from qlora_trainer.memory.picture_data import made_by
from qlora_trainer.run.foresee import foresee_run, run_for_model
from qlora_trainer.units import format_bytes

GIB = 2**30
LEFT_FREE_BYTES = int(0.3 * GIB)
PINNED_LIMIT_BYTES = 24 * GIB
LENGTHS = (*range(256, 8192, 256), *range(8192, 131073, 1024))
RANK = ("adapter.rank=32", "adapter.alpha=32", "train.gradient_accumulation_steps=1")
LEAN = (
    "train.activations=offload",
    "train.fused_mlp=true",
    "train.mlp_tile_tokens=2048",
    "train.tiled_norms=true",
    "model.embeddings_on_host=true",
    "model.head_on_host=true",
    "train.optimizer=paged_adamw_8bit",
)
HEAD_HERE = ("model.head_on_host=false",)
HEAD_8 = ("model.head_bits=8", *HEAD_HERE)
HEAD_4 = ("model.head_bits=4", *HEAD_HERE)
STREAM = ("model.stream_layers=true",)
SMALL_TILES = ("train.mlp_tile_tokens=256", "train.loss_chunk_tokens=32")


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
        name: What it is called.
        model: Of `profiles/models`.
        card: Of `profiles/gpus`.
        settings: Beside `RANK` and `LEAN`.
        tokens: The length; None asks for the longest.
        most_bytes: The bound on reserved memory, where there is one.
        least_tokens: The bound on the longest length, where there is one.
        unsloth: What Unsloth publishes for such a card.
        pinned_limit: At most 24 GiB of pinned host memory.
        must_fit: The bound is the card's budget.
    """

    name: str
    model: str
    card: str
    settings: tuple[str, ...] = ()
    tokens: int | None = None
    most_bytes: int | None = None
    least_tokens: int | None = None
    unsloth: int | None = None
    pinned_limit: bool = False
    must_fit: bool = False


EIGHT, SEVENTY = "llama-3.1-8b", "llama-3.3-70b"
CASES = (
    Case("8b-2048", EIGHT, "rtx-4060-8gb", tokens=2048, most_bytes=int(5.6 * GIB)),
    Case("8b-2048-head-here", EIGHT, "rtx-4060-8gb", HEAD_HERE, 2048, int(5.6 * GIB)),
    Case("8b-2048-stream", EIGHT, "rtx-4060-8gb", STREAM, 2048, int(2.4 * GIB)),
    Case(
        "8b-2048-stream-head-here", EIGHT, "rtx-4060-8gb", STREAM + HEAD_HERE, 2048, int(2.4 * GIB)
    ),
    Case("8b-2048-stream-head-4", EIGHT, "rtx-4060-8gb", STREAM + HEAD_4, 2048),
    Case("8b-6gb-1024", EIGHT, "rtx-2060-6gb", tokens=1024, must_fit=True),
    Case("8b-6gb-1024-head-here", EIGHT, "rtx-2060-6gb", HEAD_HERE, 1024),
    Case("8b-6gb-1024-head-8", EIGHT, "rtx-2060-6gb", HEAD_8, 1024),
    Case("8b-6gb", EIGHT, "rtx-2060-6gb", least_tokens=1024),
    Case("8b-6gb-head-here", EIGHT, "rtx-2060-6gb", HEAD_HERE + SMALL_TILES),
    Case("8b-6gb-head-8", EIGHT, "rtx-2060-6gb", HEAD_8),
    Case("8b-6gb-stream", EIGHT, "rtx-2060-6gb", STREAM),
    Case("8b-8gb", EIGHT, "rtx-4060-8gb", least_tokens=16_384, unsloth=2972),
    Case("8b-8gb-head-4", EIGHT, "rtx-4060-8gb", HEAD_4, unsloth=2972),
    Case("8b-12gb", EIGHT, "rtx-3060-12gb", HEAD_HERE, least_tokens=40_000, unsloth=21_848),
    Case("8b-16gb", EIGHT, "rtx-4060-ti-16gb", HEAD_HERE, least_tokens=80_000, unsloth=40_724),
    Case("8b-24gb", EIGHT, "rtx-3090-24gb", HEAD_HERE, least_tokens=131_072, unsloth=78_475),
    Case("8b-24gb-pinned-24", EIGHT, "rtx-3090-24gb", HEAD_HERE, pinned_limit=True, unsloth=78_475),
    Case("70b-4096", SEVENTY, "rtx-a6000-48gb", HEAD_HERE, 4096, 40 * GIB),
    Case("70b-48gb", SEVENTY, "rtx-a6000-48gb", HEAD_HERE, least_tokens=24_000, unsloth=12_106),
    Case(
        "70b-48gb-pinned-24",
        SEVENTY,
        "rtx-a6000-48gb",
        HEAD_HERE,
        unsloth=12_106,
        pinned_limit=True,
    ),
    Case("70b-24gb-4096-stream", SEVENTY, "rtx-3090-24gb", STREAM + HEAD_HERE, 4096),
    Case("70b-24gb-stream", SEVENTY, "rtx-3090-24gb", STREAM + HEAD_HERE),
)


def foresee(case: Case, tokens: int, gpu: GpuProfile) -> Foresight:
    """What a case needs at a length."""
    settings = [*RANK, *LEAN, *case.settings, f"data.max_seq_len={tokens}"]
    run = run_for_model(str(MODELS / f"{case.model}.json"), settings)
    return foresee_run(run, gpu, budget_bytes=gpu.usable_bytes - LEFT_FREE_BYTES)


def fits(case: Case, found: Foresight) -> bool:
    """Whether card and pinned memory do."""
    return found.fits and not (case.pinned_limit and found.pinned_bytes > PINNED_LIMIT_BYTES)


def answer(case: Case) -> dict[str, Any]:
    """Simulate one case."""
    gpu = read_gpu(case.card)
    if case.tokens is not None:
        found = foresee(case, case.tokens, gpu)
        return row(case, case.tokens if fits(case, found) else 0, case.tokens, found, None)
    tried: dict[int, Foresight] = {}

    def asked(index: int) -> bool:
        tried[index] = foresee(case, LENGTHS[index], gpu)
        print(f"  {case.name} {LENGTHS[index]:,}: {format_bytes(tried[index].total_bytes)}",
              flush=True)  # fmt: skip
        return fits(case, tried[index])

    last = last_that_fits(len(LENGTHS), asked, lambda low, high: _guess(case, tried, low, high))
    following = LENGTHS[last + 1] if last + 1 < len(LENGTHS) else None
    shown = max(last, 0)
    return row(case, LENGTHS[last] if last >= 0 else 0, LENGTHS[shown], tried[shown], following)


def _guess(case: Case, tried: dict[int, Foresight], low: int, high: int) -> int:
    """Where two simulations' straight line meets the card or the pinned limit."""
    if len(tried) < 2:
        return (3, 15)[len(tried)]
    budgets = [(lambda f: float(f.total_bytes), float(tried[min(tried)].capacity_bytes))]
    if case.pinned_limit:
        budgets.append((lambda f: float(f.pinned_bytes), float(PINNED_LIMIT_BYTES)))
    first, second = sorted(tried)[-2:] if low < 0 or high >= len(LENGTHS) else (low, high)
    reached = float("inf")
    for need, budget in budgets:
        x, y = LENGTHS[first], LENGTHS[second]
        slope = max((need(tried[second]) - need(tried[first])) / (y - x), 1.0)
        reached = min(reached, x + (budget - need(tried[first])) / slope)
    return sum(length <= reached for length in LENGTHS) - 1


def row(
    case: Case, fitting: int, tokens: int, found: Foresight, following: int | None
) -> dict[str, Any]:
    """A case's answer as plain data."""
    met = None
    if case.most_bytes is not None:
        met = found.reserved_bytes <= case.most_bytes
    elif case.least_tokens is not None:
        met = fitting >= case.least_tokens
    elif case.must_fit:
        met = fitting > 0
    said: dict[str, Any] = {
        "model": case.model,
        "card": case.card,
        "settings": [*RANK, *LEAN, *case.settings],
        "asked": "longest" if case.tokens is None else case.tokens,
        "fits": fitting > 0,
        "tokens": tokens,
        "next_tokens": following,
        "reserved_bytes": found.reserved_bytes,
        "allocated_bytes": found.allocated_bytes,
        "total_bytes": found.total_bytes,
        "budget_bytes": found.capacity_bytes,
        "pinned_bytes": found.pinned_bytes,
        "moved_bytes": found.moved_bytes,
        "moving_seconds": found.moving_seconds,
        "host_bytes": found.host_peak_bytes,
        "peak_phase": found.peak_phase,
        "bound": case.most_bytes or case.least_tokens,
        "met": met,
        "unsloth_tokens": case.unsloth,
    }
    if met is False or not fitting:
        said["alive"] = [
            {"bytes": t.total_bytes, "tensors": t.count, "what": t.component, "made_by": made_by(t)}
            for t in found.alive[:12]
        ]
    return said


def tell(name: str, said: dict[str, Any]) -> None:
    """One line, and what holds the memory where a bound is missed."""
    verdict = {True: "met", False: "MISSED", None: ""}[said["met"]]
    print(
        f"{name}: {said['tokens']:,} tokens{'' if said['fits'] else ' DO NOT FIT'}, reserved "
        f"{format_bytes(said['reserved_bytes'])}, total {format_bytes(said['total_bytes'])} of "
        f"{format_bytes(said['budget_bytes'])}; pinned {format_bytes(said['pinned_bytes'])}, "
        f"{format_bytes(said['moved_bytes'])} over PCIe a step, {said['moving_seconds']:.1f} s "
        f"{verdict}",
        flush=True,
    )
    for tensor in said.get("alive", []):
        print(f"    {format_bytes(tensor['bytes']):>10}  {tensor['tensors']}x {tensor['what']}: "
              f"{tensor['made_by']}")  # fmt: skip


def main() -> int:
    """Command line: all cases, or some."""
    parser = argparse.ArgumentParser(description="Foresee memory and longest sequences.")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen = [case for case in CASES if not arguments.only or case.name in arguments.only]
    rows: dict[str, Any] = {}
    if arguments.json and arguments.json.is_file():
        rows = json.loads(arguments.json.read_text(encoding="utf-8"))["cases"]
    for case in chosen:
        rows[case.name] = answer(case)
        tell(case.name, rows[case.name])
        if arguments.json:
            kept = {known.name: rows[known.name] for known in CASES if known.name in rows}
            content = {"versions": versions(), "left_free_bytes": LEFT_FREE_BYTES, "cases": kept}
            write_json(arguments.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
