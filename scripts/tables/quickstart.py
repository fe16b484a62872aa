"""The main job's table: ours beside PEFT."""

from __future__ import annotations

from typing import Any

from tables.common import markdown, result


def quickstart() -> str:
    """What the quickstart's benchmark measured, beside PEFT; parts not measured are left out."""
    found = result("quickstart")
    ours, peft, films = found["quickstart"], found["peft"], found["quickstart"]["film_reviews"]
    rows = [
        ["film reviews: held-out loss", f"{ours['loss_before']:.4f}", f"{ours['loss']:.4f}",
         f"{peft['loss']:.4f}"],
        [f"film reviews: accuracy on {films['before']['rows']} held-out rows (95 % interval)",
         share(films["before"]), share(films["after"]), share(peft["film_reviews"])],
    ]  # fmt: skip
    if "alpaca" in found:
        alpaca = found["alpaca"]
        losses = (alpaca["ours"]["loss_before"], alpaca["ours"]["loss"], alpaca["peft"]["loss"])
        rows.append(["Alpaca format: held-out loss", *(f"{loss:.4f}" for loss in losses)])
    table = markdown(["", "before", "qlora_trainer", "PEFT, fp32 adapters"], rows)
    said = [
        "Same base in NF4, same batches, steps and learning rate. Losses, answers and bits are "
        "compared, not the times of the parts, which may have run beside other work.",
        f"From a clone to the trained, measured and merged adapter: "
        f"{ours['seconds_after_install'] / 60:.1f} minutes on {found['machine']['cores']} CPU "
        f"cores, and {ours['seconds']['install'] / 60:.1f} for the install before it.",
    ]
    if "fp32" in found:
        ratio = found["comparisons"]["bf16_adapter_loss_over_fp32"]
        said.append(f"The bf16 adapter's final loss is {ratio:.4f} of an fp32 one's.")
    if "resume" in found:
        resume = found["resume"]
        said.append(
            f"Killed {resume['kills']} times at random moments, the run ended with "
            f"{resume['bits_different']} of {resume['bits_compared']:,} bits different."
        )
    if "bad-inputs" in found:
        said.append(
            f"{found['bad-inputs']['kinds']} kinds of bad run files and data tried, each answered "
            "with where it is wrong and what to do."
        )
    return f"{table}\n\n{' '.join(said)}"


def share(part: dict[str, Any]) -> str:
    """An accuracy with its interval."""
    found = part["accuracy"]
    return f"{found['estimate']:.1%} ({found['low']:.1%} to {found['high']:.1%})"
