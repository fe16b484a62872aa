"""How little memory a step takes and how long a sequence fits, of `foresee_lengths.py`."""

from __future__ import annotations

from typing import Any

from tables.common import markdown, result

GIB = 2**30
_SIZES = {
    "rtx-2060-6gb": "6 GB", "rtx-4060-8gb": "8 GB", "rtx-3060-12gb": "12 GB",
    "rtx-4060-ti-16gb": "16 GB", "rtx-3090-24gb": "24 GB", "rtx-a6000-48gb": "48 GB",
}  # fmt: skip
_MODELS = {"llama-3.1-8b": "8B", "llama-3.3-70b": "70B"}
_WITH = {
    "model.head_bits=8": "head in 8 bit",
    "model.head_bits=4": "head in 4 bit",
    "model.stream_layers=true": "streamed layers",
    "train.mlp_tile_tokens=256": "tiles of 256 tokens",
}


def lengths() -> str:
    """A row per case: what it takes of the card, of pinned memory and of PCIe."""
    found = result("lengths")
    rows = [_row(name, case) for name, case in found["cases"].items()]
    head = [
        "model, card", "tokens", "reserved", "pinned host", "over PCIe a step", "at 12 GB/s",
        "Unsloth",
    ]  # fmt: skip
    libraries = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"{markdown(head, rows)}\n\nForeseen, not measured, with {libraries}; "
        f"{found['left_free_bytes'] / GIB:.1f} GiB of each card stay free. The head is in 16 bit, "
        "in host memory but for the loss, unless stated. Where a length is not "
        "given it is the longest that fits; the next one tried does not, or the model ends there. "
        "Copies run beside the computing, but for the head's and the token embeddings'; what the "
        "driver pages of optimizer states is not counted. Unsloth's column is what it "
        "[publishes](https://docs.unsloth.ai/basics/unsloth-benchmarks) for a card of that size."
    )


def _row(name: str, case: dict[str, Any]) -> list[str]:
    last = dict(setting.split("=") for setting in case["settings"])  # a later one counts
    extras = [words for setting, words in _WITH.items() if setting in case["settings"]]
    if last.get("model.head_on_host") != "true" and not any("head" in e for e in extras):
        extras.append("head on the card")
    if name.endswith("pinned-24"):
        extras.append("at most 24 GiB pinned")
    label = f"Llama {_MODELS[case['model']]}, {_SIZES[case['card']]}"
    label += f" ({', '.join(extras)})" if extras else ""
    given = "" if case["asked"] == "longest" else " (given)"
    tokens = f"{case['tokens']:,}{given}" if case["fits"] else f"{case['tokens']:,} does not fit"
    unsloth = case["unsloth_tokens"]
    return [
        label,
        tokens,
        f"{case['reserved_bytes'] / GIB:.2f} GiB",
        f"{case['pinned_bytes'] / GIB:.1f} GiB",
        f"{case['moved_bytes'] / GIB:.1f} GiB",
        f"{case['moving_seconds']:.1f} s",
        "-" if unsloth is None else f"{unsloth:,}",
    ]
