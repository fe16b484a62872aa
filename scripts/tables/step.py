"""The step beside the others', of `benchmark_step.py --part`: speed, memory, losses, ablation."""

from __future__ import annotations

from typing import Any

from tables.common import markdown, result

MIB = 2**20
_SETTINGS = {
    "equal-1x512": "135M, 1 x 512",
    "equal-4x512": "135M, 4 x 512",
    "1b-equal-1x512": "1.1B, 1 x 512",
    "real": "135M, instructions",
}
_NAMES = {
    "ours": "ours, recomputing",
    "ours-own": "ours, keeping all",
    "ours-packed": "ours, packed, keeping all",
    "peft": "PEFT, recomputing",
    "trainer": "Trainer, recomputing",
    "trainer-defaults": "Trainer as it comes",
    "trl-packed": "TRL, packed, keeping all",
}


def step() -> str:
    """A row per contender of each comparison that was measured."""
    parts = result("step")
    rows = [row for name in _SETTINGS if name in parts for row in _rows(name, parts[name])]
    head = ["", "tokens/s", "ours is faster by", "peak over the base", "of the products' rate"]
    return f"{markdown(head, rows)}\n\n{_said(parts)}"


def _rows(name: str, part: dict[str, Any]) -> list[list[str]]:
    rows = []
    for contender, speed in part["tokens_per_second"].items():
        faster, share = "-", "-"
        if contender in part["times_faster"]:
            low, high = part["spread"][contender]
            faster = f"{part['times_faster'][contender]:.2f} ({low:.2f} to {high:.2f})"
        elif not part["settings"]["data"]:
            share = f"{part['ceiling_share']:.0%}"
        rows.append(
            [
                f"{_SETTINGS[name]}: {_NAMES[contender]}",
                f"{speed:,.0f}",
                faster,
                f"{part['peak_step_bytes'][contender] / MIB:,.0f} MiB",
                share,
            ]
        )
    return rows


def _said(parts: dict[str, Any]) -> str:
    threads = next(iter(parts.values()))["settings"]["threads"]
    said = (
        f"On {threads} cores, medians of turns that alternate; in brackets the least and the most "
        "of them. The first row of each comparison is what `faster` compares with; its last column "
        "is the time of the base's matrix products alone, at the rate measured in the same run, "
        "over the time of the step."
    )
    loads = [
        figures["cores_busy_elsewhere"] or 0.0
        for name, part in parts.items()
        if name in _SETTINGS
        for turn in part["turns"]
        for figures in turn.values()
    ]
    said += f" Other programs kept {min(loads):.1f} to {max(loads):.1f} of the cores busy."
    if "same-losses" in parts:
        part = parts["same-losses"]
        (apart,) = part["loss_difference"].values()
        said += (
            f" {part['settings']['steps']} steps from one fp32 adapter on the instructions: no "
            f"step's loss is more than {apart:.2%} from PEFT's."
        )
    return said


def step_ablation() -> str:
    """Ours, and what leaving one technique out changes."""
    part = result("step")["ablation-1x512"]
    rows = []
    for name, speed in part["tokens_per_second"].items():
        left_out = name.removeprefix("ours-without-").replace("-", " ")
        rows.append(
            [
                "all techniques" if name == "ours" else f"without {left_out}",
                f"{speed:,.0f}",
                f"{part['peak_step_bytes'][name] / MIB:,.0f} MiB",
            ]
        )
    return markdown(["135M, 1 x 512, recomputing", "tokens/s", "peak over the base"], rows)
