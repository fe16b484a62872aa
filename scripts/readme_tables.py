"""Write the README's tables from what was measured and declared, so that none is written by hand.

    python scripts/readme_tables.py [--check]

Every `<!-- table: NAME -->` ... `<!-- end table -->` of the README is filled from the settings'
declarations or from the JSON files in `scripts/results/`, which the benchmarks write. `--check`
changes nothing and fails where the README differs; a test runs it. Needs the package installed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
RESULTS = REPOSITORY / "scripts" / "results"


def result(name: str) -> dict[str, Any]:
    """What a benchmark wrote."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table; every column but the first is right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def settings() -> str:
    """Every setting of the run file."""
    from qlora_trainer.config.document import settings_table

    rows = [[f"`{name}`", f"`{default}`", text] for name, default, text in settings_table()]
    lines = [["setting", "default", "what it does"], ["---"] * 3, *rows]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"<details><summary>All {len(rows)} settings</summary>\n\n{table}\n\n</details>"


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
        "Same base in NF4, same batches, steps and learning rate. The parts were run one by one, "
        "on a machine that did other work during some of them: losses may be compared, times of "
        "different parts may not.",
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


def fits() -> str:
    """The longest sequence per model and card; a cell leads to its run file."""
    found = result("fits")
    cards = found["cards"]
    rows = []
    for model, row in found["rows"].items():
        lengths = [row["cells"][card] for card in cards]
        linked = [
            "-" if length is None else f"[{length:,}](profiles/runs/{card}/{model}.yaml)"
            for card, length in zip(cards, lengths, strict=True)
        ]
        rows.append([row["source"].split("/")[-1], *linked])
    rows.sort(key=lambda cells: -sum(cell != "-" for cell in cells))
    head = ["model", *(f"{card.rsplit('-', 1)[1].removesuffix('gb')} GB" for card in cards)]
    names = ", ".join(f"`{card}`" for card in cards)
    libraries = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return f"{markdown(head, rows)}\n\nForeseen for {names} with {libraries}."


def export_proof() -> str:
    """Both ways of merging against base + adapter, of a trained run."""
    found = result("export")["proof"]
    shown = (
        ("perplexity of base + adapter", "reference_perplexity", "{:.4f}"),
        ("perplexity of the export", "export_perplexity", "{:.4f}"),
        ("mean KL divergence (nats)", "mean_kl", "{:.2e}"),
        ("same most likely token", "top1_agreement", "{:.2%}"),
        ("relative difference of logits", "relative_difference", "{:.1e}"),
    )
    columns = {
        f"onto {way}, {precision}": figures
        for way, part in found["ways"].items()
        for precision, figures in part.items()
    }
    rows = [[label, *(form.format(f[key]) for f in columns.values())] for label, key, form in shown]
    rows_of = found["rows"]
    return (
        f"{markdown(['', *columns], rows)}\n\n{found['base']['name']} with its rank "
        f"{found['adapter']['rank']} adapter, merged in {found['dtype']}; "
        f"{rows_of['positions']} positions of {rows_of['from']}, in a new process with plain "
        f"transformers {found['transformers']}. Native: base + adapter as trained, the export as "
        f"written. fp32: both sides compute in fp32. `--onto best` kept {found['kept']}."
    )


def export_speed() -> str:
    """Time and memory of a merge beside copying the files and PEFT's merge."""
    found = result("export")
    names = {
        "copy": "copying the files",
        "original": "merging onto original",
        "dequantized": "merging onto dequantized",
        "peft": "PEFT merge_and_unload, saved",
    }
    rows, loads = [], []
    for size in ("1.1b", "7b"):
        jobs = found.get(size, {}).get("jobs", {})
        for job, label in names.items():
            if job in jobs:
                part = jobs[job]
                rows.append(
                    [
                        f"{size.upper()}: {label}",
                        f"{part['seconds']:.1f} s",
                        f"{part['seconds'] / jobs['copy']['seconds']:.2f}",
                        f"{part['peak_private_bytes'] / 10**6:,.0f} MB",
                    ]
                )
        if jobs:
            loads.append(f"{size.upper()} {found[size]['machine']['load_before']:.1f}")
    head = ["", "time", "over copying", "memory over the imports"]
    return (
        f"{markdown(head, rows)}\n\nfp16 from bf16, rank 16 on every linear layer, random "
        "weights; each job in a fresh process, the base's files out of the page cache before it, "
        "its own forced to disk after it. Load of the machine's two cores before the jobs (from "
        f"other work): {', '.join(loads)}."
    )


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings,
    "quickstart": quickstart,
    "fits": fits,
    "export-proof": export_proof,
    "export-speed": export_speed,
}


def filled(readme: str) -> str:
    """The README with every table made anew.

    Raises:
        KeyError: The README asks for a table nobody makes.
    """

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    pattern = r"(<!-- table: ([\w-]+) -->)\n.*?(<!-- end table -->)"
    return re.sub(pattern, fill, readme, flags=re.S)


def main() -> int:
    """Command line: write, or check."""
    parser = argparse.ArgumentParser(description="Fill the README's tables.")
    parser.add_argument("--check", action="store_true", help="only say whether they are current")
    check = parser.parse_args().check
    before = README.read_text(encoding="utf-8")
    after = filled(before)
    if before == after:
        return 0
    if check:
        print("README.md is not what scripts/readme_tables.py makes; run it", file=sys.stderr)
        return 1
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
