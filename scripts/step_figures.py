"""What the rounds of `benchmark_step.py` add up to: medians, ratios of one round, their spread."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Round = Mapping[str, Mapping[str, Any]]


def summarize(warm_up: Sequence[Round], rounds: Sequence[Round], flops: float) -> dict[str, Any]:
    """The figures of a part.

    Args:
        warm_up: Contender -> what its step took, round by round; for losses and memory alone.
        rounds: The same of the rounds that count; the first contender is ours.
        flops: Of the base's products per token, for the share of the ceiling.
    """
    names = list(rounds[0])
    ours = names[0]
    ratios = {name: ratios_of(rounds, ours, name) for name in names[1:]}
    every = [*warm_up, *rounds]
    peaks = {n: max(steps[n]["peak_step_bytes"] for steps in every) for n in names}
    losses = {n: [steps[n]["loss"] for steps in every] for n in names}
    shares = {n: statistics.median(_shares(rounds, n, flops)) for n in names}
    return {
        "tokens_per_second": {
            n: statistics.median(steps[n]["tokens_per_second"] for steps in rounds) for n in names
        },
        "peak_step_bytes": peaks,
        "final_loss": {n: losses[n][-1] for n in names},
        "times_faster": {n: statistics.median(found) for n, found in ratios.items()},
        "spread": {n: [min(found), max(found)] for n, found in ratios.items()},
        "quartiles": {n: quartiles(found) for n, found in ratios.items()},
        "memory_share": {n: peaks[ours] / peaks[n] for n in names[1:]},
        "ceiling_share": shares[ours],
        "ceiling_shares": shares,
        "loss_difference": {n: apart(losses[ours], losses[n]) for n in names[1:]},
        "losses": losses,
    }


def ratios_of(rounds: Sequence[Round], one: str, other: str) -> list[float]:
    """How many times as many tokens per second, round by round."""
    return [steps[one]["tokens_per_second"] / steps[other]["tokens_per_second"] for steps in rounds]


def quartiles(values: Sequence[float]) -> list[float]:
    """Between which the middle half lies.

    >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0]), quartiles([2.0])
    ([2.0, 4.0], [2.0, 2.0])
    """
    if len(values) == 1:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def apart(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference of two losses of the same step."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def _shares(rounds: Sequence[Round], name: str, flops: float) -> list[float]:
    steps = [found[name] for found in rounds]
    return [
        flops * step["tokens"] / step["products_per_second"] / step["step_seconds"]
        for step in steps
    ]
