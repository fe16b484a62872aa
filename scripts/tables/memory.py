"""Foresight held against what was measured, and what asking costs."""

from __future__ import annotations

from typing import Any

from tables import common
from tables.common import markdown, result

_T4 = (  # what, key of the summary, bound
    ("T4, peak allocated: mean error", "allocated_mean_abs_error", "0.15 %"),
    ("T4, peak allocated: worst", "allocated_worst_error", "0.5 %"),
    ("T4, peak reserved: mean", "reserved_mean_abs_error", "2 %"),
    ("T4, peak reserved: worst", "reserved_worst_error", "6 %"),
    ("T4, peak reserved: worst under-prediction", "reserved_worst_under", "4 %"),
    ("T4, allocated after load: mean", "after_load_mean_abs_error", "0.5 %"),
    ("T4, allocated after load: worst", "after_load_worst_error", "-"),
    ("T4, forward: mean", "forward_mean_abs_error", "0.5 %"),
    ("T4, backward: mean", "backward_mean_abs_error", "0.5 %"),
    ("T4, optimizer step: mean", "optimizer_mean_abs_error", "0.5 %"),
)
_SAME_LOAD = ("model_id", "quantization", "double_quant", "compute_dtype")


def memory() -> str:
    """Errors of the prediction, beside the bounds that were set beforehand."""
    t4 = result("memory-t4")
    rows = [[what, _share(t4["summary"][key]), bound] for what, key, bound in _T4]
    others = {card: result(f"memory-{card}") for card in ("a100", "l40s")}
    a100, l40s = (found["summary"] for found in others.values())
    rows += [
        ["A100, peak allocated: worst", _share(a100["allocated_worst_error"]), "1.5 %"],
        ["L40S, peak reserved: worst", _share(l40s["reserved_worst_error"]), "1.5 %"],
    ]
    own = ""
    if (common.RESULTS / "memory-cpu.json").is_file():
        steps = result("memory-cpu")["rows"]
        for settings in dict.fromkeys(step["settings"] for step in steps):
            errors = [s["errors"]["allocated"] for s in steps if s["settings"] == settings]
            worst = _share(max(errors, key=abs))
            rows.append([f"this CPU, live storages, {settings}: worst", worst, "0.5 %"])
        kinds = len({step["model"] for step in steps})
        own = f", and {len(steps)} of {kinds} architectures measured here"
    model, low, high = _widest(t4["rows"])
    return (
        f"{markdown(['', 'error', 'bound'], rows)}\n\n"
        f"{len(t4['rows'])} training steps that others measured on a T4, "
        f"{len(others['a100']['rows'])} on an A100, {len(others['l40s']['rows'])} on an L40S "
        f"(`tests/memory/measurements`){own}; nothing is "
        f"fitted to them. After load no prediction can be right for every row: {model}, loaded "
        f"alike, was measured once at {low:.1f} and once at {high:.1f} MiB, presumably as the "
        "loader's threads happened to run."
    )


def profile_cost() -> str:
    """Time and host memory of `qlora profile`."""
    found = result("profile")
    names = {
        "7b": "Llama-2-7B",
        "70b": "Llama-3.3-70B",
        "7b-sweep": "Llama-2-7B",
    }
    rows = [
        [
            f"{names[name]}{_count(run)}",
            f"{run['seconds']:.1f} s",
            f"{run['peak_resident_bytes'] / 2**20:,.0f} MiB",
        ]
        for name, run in found["runs"].items()
    ]
    return (
        f"{markdown(['', 'time', 'host RAM'], rows)}\n\nThe whole process from its start, on "
        f"{found['machine']['cores']} CPU cores."
    )


def _count(run: dict[str, Any]) -> str:
    count = run["configurations"]
    return f", {count} configurations" if count > 1 else ", one configuration"


def _share(error: float) -> str:
    return f"{abs(error):.2%}"


def _widest(rows: list[dict[str, Any]]) -> tuple[str, float, float]:
    """The model whose equal loads were measured furthest apart, in MiB."""
    loads: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        key = tuple(row[name] for name in _SAME_LOAD)
        loads.setdefault(key, []).append(float(row["after_load_allocated_mib"]))
    key, sizes = max(loads.items(), key=lambda item: max(item[1]) / min(item[1]))
    return key[0].split("/")[-1], min(sizes), max(sizes)
