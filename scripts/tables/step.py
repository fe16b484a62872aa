"""The step beside the others', of `benchmark_step.py --part`: speed, memory, losses, ablation."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from step_figures import apart, quartiles, ratios_of

from tables.common import markdown, recorded, result

MIB = 2**20
_SETTINGS = {
    "equal-1x512": "135M, 1 x 512",
    "equal-4x512": "135M, 4 x 512",
    "1b-equal-1x512": "1.1B, 1 x 512",
    "1b-keep-1x512": "1.1B, 1 x 512, alone",
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
    "trl-packed-512": "TRL, packed to 512, keeping all",
}
_OWN = ("ours-own", "ours-packed")  # with our own choice of what to keep


def step() -> str:
    """A row per contender of each comparison that was measured, in bf16."""
    return _step(result("step"))


def step_fp32() -> str:
    """The same on a CPU without bf16 products, where all compute in fp32."""
    return _step(result("step-fp32"))


def _step(parts: dict[str, Any]) -> str:
    rows = [row for name in _SETTINGS if name in parts for row in _rows(name, parts[name])]
    head = [
        "", "tokens/s", "ours over it, equal settings", "ours keeping all over it",
        "peak over the base", "share of the ceiling",
    ]  # fmt: skip
    return f"{markdown(head, rows)}\n\n{_said(parts)}"


def _rows(name: str, part: dict[str, Any]) -> list[list[str]]:
    rows = []
    speeds = part["tokens_per_second"]
    first = next(iter(speeds))
    shares = part.get("ceiling_shares", {first: part["ceiling_share"]})
    own = next((name for name in _OWN if name in speeds), None)
    for contender, speed in speeds.items():
        is_peer = not contender.startswith("ours")
        is_equal = is_peer and first == "ours"
        rows.append(
            [
                f"{_SETTINGS[name]}: {_NAMES[contender]}",
                f"{speed:,.0f}",
                _times(part["turns"], first, contender) if is_equal else "-",
                _times(part["turns"], own, contender) if own and is_peer else "-",
                f"{part['peak_step_bytes'][contender] / MIB:,.0f} MiB",
                f"{shares[contender]:.0%}" if contender in shares else "-",
            ]
        )
    return rows


def _times(turns: Sequence[Any], one: str, other: str) -> str:
    """How many times as fast, round by round: the median, and in brackets the quartiles."""
    ratios = ratios_of(turns, one, other)
    low, high = quartiles(ratios)
    return f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"


def _said(parts: dict[str, Any]) -> str:
    settings = next(parts[name] for name in _SETTINGS if name in parts)["settings"]
    cores = f"{settings['threads']} cores"
    if "cpu" in settings:
        cores += f" ({settings['cpu']}, all in {settings['dtype']})"
    said = (
        f"On {cores}, medians of rounds in which everybody takes a step in turn; in "
        "brackets the quartiles of the rounds' ratios. The ceiling is the time of the base's "
        "matrix products alone (forward, and the gradient of the input), at the rate measured "
        "beside each step; recomputing does half as many again."
    )
    loads = [
        figures["cores_busy_elsewhere"] or 0.0
        for name, part in parts.items()
        if name in _SETTINGS
        for turn in part["turns"]
        for figures in turn.values()
    ]
    said += f" Other programs kept {min(loads):.1f} to {max(loads):.1f} of the cores busy."
    turns = [len(part["turns"]) for name, part in parts.items() if name in _SETTINGS]
    rounds = " to ".join(str(count) for count in sorted({min(turns), max(turns)}))
    said += f" Rounds of a comparison: {rounds}."
    if "dtype-1x512" in parts:
        times = _times(parts["dtype-1x512"]["turns"], "ours-all-fp32", "ours-fp32")
        said += f" Ours that keeps all is {times} times as fast in fp32 as in bf16."
    if "real" in parts:
        tokens = parts["real"]["settings"]["tokens"]
        said += (
            f" Of the instructions, packed to {tokens:,} tokens where not said and padded in "
            "batches of 8 by Trainer, tokens that are no padding count."
        )
    if "compile-1x512" in parts:
        times = _times(parts["compile-1x512"]["turns"], "ours-compiled", "ours-plain")
        said += f" With `train.compile` the step of plain norms and MLPs is {times} times as fast."
    if "pages-1x512" in parts:
        without = "ours-own-without-freed-pages"
        times = _times(parts["pages-1x512"]["turns"], "ours-own", without)
        said += (
            " Keeping freed pages between steps of one shape makes a step of 1 x 512 that keeps "
            f"all {times} times as fast."
        )
    if "probabilities-1x512" in parts:
        without = "ours-own-without-probabilities"
        times = _times(parts["probabilities-1x512"]["turns"], "ours-own", without)
        said += (
            " Keeping attention's probabilities makes a step of 1 x 512 that keeps all else "
            f"{times} times as fast."
        )
    if parts.get("same-losses", {}).get("losses"):
        said += f" {_same_losses(parts['same-losses'])}"
    return said


def _same_losses(part: dict[str, Any]) -> str:
    losses = part["losses"]
    exact, ours, theirs = (losses[n] for n in ("peft-all-fp32", "ours-fp32", "peft-fp32"))
    above = {
        who: statistics.fmean(a / b - 1 for a, b in zip(found, exact, strict=True))
        for who, found in (("ours", ours), ("theirs", theirs))
    }
    mean = statistics.fmean(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    return (
        f"{len(exact)} steps from one fp32 adapter on the instructions, packed to "
        f"{part['settings']['tokens']:,} tokens: computed in fp32, no step's loss is more than "
        f"{apart(losses['ours-all-fp32'], exact):.4%} from PEFT's. In bf16 ours are at most "
        f"{apart(ours, theirs):.2%} from PEFT's, in the mean {mean:.2%}; the rounding alone moves "
        f"ours by {above['ours']:+.2%} in the mean, PEFT's by {above['theirs']:+.2%}."
    )


def load() -> str:
    """What loading took, in a sentence."""
    found = recorded("load")
    if found is None:
        return "What loading takes has not been measured yet (`scripts/benchmark_load.py`)."
    seconds = found["seconds"]
    return (
        f"A base of {found['quantized_weights'] / 1e9:.1f} billion quantized weights is loaded on "
        f"{found['threads']} cores in {seconds['quantize']:.1f} s (transformers and bitsandbytes "
        f"alone: {seconds['bitsandbytes']:.1f} s, to the same codes); with "
        f"`model.quantized_cache` the first time in {seconds['first']:.1f} s, then in "
        f"{seconds['second']:.1f} s. Medians of {len(found['seconds_of_rounds']['first'])} rounds."
    )


def step_ablation() -> str:
    """Ours, and what leaving one technique out changes."""
    part = result("step")["ablation-1x512"]
    named = {n: n.removeprefix("ours-").replace("-", " ") for n in part["tokens_per_second"]}
    table = _one_a_row(
        part, named | {"ours": "all techniques"}, "all over it", lambda name: ("ours", name)
    )
    return (
        f"{table}\n\nMedians of {len(part['turns'])} rounds; in brackets the "
        "quartiles. Where 1 lies between them the technique's worth in speed is within the noise."
    )


def step_alone() -> str:
    """The step without any technique, and what each brings by itself."""
    part = (recorded("step-fp32") or {}).get("alone-1x512")
    if part is None:
        return "What each brings alone has not been measured yet (`--part alone-1x512`)."
    named = {
        n: f"{n.removeprefix('ours-only-').replace('-', ' ')} alone"
        for n in part["tokens_per_second"]
    }
    table = _one_a_row(
        part, named | {"ours-bare": "none"}, "over none", lambda name: (name, "ours-bare")
    )
    return f"{table}\n\nMedians of {len(part['turns'])} rounds, as above."


def _one_a_row(
    part: dict[str, Any],
    named: Mapping[str, str],
    ratio: str,
    compared: Callable[[str], tuple[str, str]],
) -> str:
    """A contender a row, in words for each; but the first `compared`, the one to the other."""
    rows = []
    for index, (name, words) in enumerate(named.items()):
        worth = "-"
        if index:
            one, other = compared(name)
            low, high = quartiles(ratios_of(part["turns"], one, other))
            noise = ", within the noise" if low <= 1 <= high else ""
            worth = f"{_times(part['turns'], one, other)}{noise}"
        peak = f"{part['peak_step_bytes'][name] / MIB:,.0f} MiB"
        rows.append([words, f"{part['tokens_per_second'][name]:,.0f}", worth, peak])
    head = ["135M, 1 x 512, recomputing", "tokens/s", ratio, "peak over the base"]
    return markdown(head, rows)
