"""Every task on real data: before and after, beside PEFT."""

from __future__ import annotations

from typing import Any

from tables.common import markdown, result

# How the figures are said; all others are shares.
_PERCENT = ("exact_match", "bleu", "chrf")
_NAMES = {"f1": "F1", "macro_f1": "macro F1", "exact_match": "exact match", "bleu": "BLEU",
          "chrf": "chrF", "top5_accuracy": "top-5 accuracy"}  # fmt: skip


def tasks() -> str:
    """A line for each figure of each case; what was not run is said."""
    found = result("tasks")
    rows, skipped = [], []
    for name, case in found.items():
        if "skipped" in case:
            skipped.append(f"`{name}` is not there: {case['skipped']}.")
            continue
        for number, (metric, means) in enumerate(case["means"].items()):
            first = [name, case_text(case)] if number == 0 else ["", ""]
            last = [f"{case['trained_share']:.1%}", minutes(case)] if number == 0 else ["", ""]
            shown = [figure(case, metric, means[side]) for side in ("before", "ours", "peft")]
            rows.append([*first, _NAMES.get(metric, metric.replace("_", " ")), *shown, *last])
    head = ["", "model and data", "held-out figure", "before", "qlora_trainer", "PEFT", "trained",
            "minutes"]  # fmt: skip
    return "\n\n".join(
        part for part in (markdown(head, rows), " ".join([*_said(found), *skipped])) if part
    )


def case_text(case: dict[str, Any]) -> str:
    """Model and data; random weights are said."""
    model = f"{case['model']}, random weights" if case["weights"] == "random" else case["model"]
    seeds = len(case["runs"])
    return f"{model}; {case['data']}" + (f"; mean of {seeds} seeds" if seeds > 1 else "")


def figure(case: dict[str, Any], metric: str, value: float) -> str:
    """Shares with three digits; what counts in percent with one."""
    percent = metric in _PERCENT or case["task"] == "question-answering"
    return f"{value:.1f}" if percent else f"{value:.3f}"


def minutes(case: dict[str, Any]) -> str:
    """Of the slowest seed, both sides together: of the processor, where that was taken.

    A process that was paused, so that others could measure, tells nothing by the clock.
    """
    if case.get("paused"):
        return "-"
    return f"{case.get('processor_seconds', case['seconds']) / 60:.1f}"


def _said(found: dict[str, Any]) -> list[str]:
    cases = [case for case in found.values() if "skipped" not in case]
    worst = min((w for case in cases for w in [_over_peft(case)]), default=1.0)
    return [
        "Same base bit for bit, same first values, batches, order, steps and learning rate on "
        "both sides; each figure is of the last step, on rows held out. Minutes are of the slowest "
        "seed, both sides with all their scoring, one thread: time of the processor, or, of older "
        "figures that hold no other, on the clock with another case beside it on two cores.",
        *(
            f"The process of `{name}` was paused for others, so its minutes are not known."
            for name, case in found.items()
            if case.get("paused")
        ),
        f"In each case's first figure the least of ours over PEFT's is {worst:.3f}.",
    ]


def _over_peft(case: dict[str, Any]) -> float:
    means = next(iter(case["means"].values()))
    return float(means["ours"] / means["peft"]) if means["peft"] else 1.0
