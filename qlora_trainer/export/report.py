"""What an export says of itself: `export_report.json` for machines, the model card for people.

Only facts of the export go in; of a local base only its name, no paths of the user's machine.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from qlora_trainer.base.dtype import dtype_name
from qlora_trainer.export.candidates import Merged
from qlora_trainer.export.merged import Prepared
from qlora_trainer.export.proof import ProofRequest
from qlora_trainer.export.reference import auto_class_name
from qlora_trainer.export.source import ExportSource, last_part
from qlora_trainer.lora.peft_config import CONFIG_NAME, read_json

REPORT_NAME = "export_report.json"
_SHOWN = (
    ("mean_kl", "mean KL divergence (nats)", "{:.3g}"),
    ("max_kl", "largest KL divergence (nats)", "{:.3g}"),
    ("top1_agreement", "same most likely token", "{:.2%}"),
    ("max_logit_difference", "largest logit difference", "{:.3g}"),
    ("relative_difference", "relative difference of logits", "{:.2e}"),
    ("reference_perplexity", "perplexity of base + adapter", "{:.4f}"),
    ("export_perplexity", "perplexity of the export", "{:.4f}"),
)


def base_name(source: str) -> str:
    """What a base is called in public: a hub name as it is, of a folder only its last part."""
    return Path(source).name if Path(source).exists() else source


def comparison_table(ways: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A Markdown table, one column for each way of merging and precision.

    Args:
        ways: Way -> its part of the report, with `proof` by precision.
    """
    columns = {
        f"{way}, {precision}": proof["figures"]
        for way, part in ways.items()
        for precision, proof in part.get("proof", {}).items()
    }
    if not columns:
        return []
    lines = [
        f"| compared with base + adapter | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for key, label, form in _SHOWN:
        if any(key in figures for figures in columns.values()):
            cells = [form.format(f[key]) if key in f else "" for f in columns.values()]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return [*lines, ""]


def model_card(report: Mapping[str, Any]) -> str:
    """The export's README.md, from its report."""
    base = report["base"]["name"]
    header = yaml.safe_dump(
        {
            "base_model": base,
            "library_name": "transformers",
            "tags": ["qlora", "lora", "merged", "qlora_trainer"],
        },
        sort_keys=False,
    )
    kept = report["kept"]
    what = {
        "original": "added to the base's own weights",
        "dequantized": "added to the base's weights as 4-bit training saw them (NF4 and back)",
    }[kept]
    auto = report["auto_class"]
    reader = "AutoImageProcessor" if "Image" in auto else "AutoTokenizer"
    name = "processor" if "Image" in auto else "tokenizer"
    lines = [
        f"---\n{header}---\n",
        f"# {base} with its adapter merged\n",
        f"The adapter (rank {report['adapter']['rank']}) was {what}; the weights are "
        f"{report['dtype']}. Made with qlora_trainer; every figure is in `{REPORT_NAME}`.\n",
        "## Proof\n",
        *_proof_words(report),
        "## Use\n",
        "```python",
        f"from transformers import {auto}, {reader}",
        f'model = {auto}.from_pretrained("path/to/this/folder", dtype="auto")',
        f'{name} = {reader}.from_pretrained("path/to/this/folder")',
        "```\n",
    ]
    return "\n".join(lines)


def _proof_words(report: Mapping[str, Any]) -> list[str]:
    rows = report.get("rows")
    if rows is None:
        return ["This export was not compared with base + adapter (`--no-proof`).\n"]
    words = (
        f"Opened in a new process with plain transformers {report['transformers']} and compared "
        f"with base + adapter on {rows['positions']} positions of {rows['from']}."
    )
    if rows.get("base_by") == "layer":
        words += " Both models were run layer by layer."
    elif rows.get("by") == "layer":
        words += " The export was run layer by layer."
    if report["reason"]:
        words += f" {report['reason']}"
    return [words + "\n", *comparison_table(report["ways"])]


def gguf_card(report: Mapping[str, Any]) -> str:
    """The README.md beside a GGUF file, from the report."""
    gguf = report["gguf"]
    base = report["base"]["name"]
    header = yaml.safe_dump(
        {"base_model": base, "library_name": "gguf", "tags": ["qlora", "gguf", "qlora_trainer"]},
        sort_keys=False,
    )
    ways = {f"merged onto {report['kept']}, {report['dtype']}": report["ways"][report["kept"]]}
    if "proof" in gguf:
        ways[f"{gguf['type']} file, read back"] = {"proof": {"fp32": gguf["proof"]}}
    lines = [
        f"---\n{header}---\n",
        f"# {base} with its adapter merged, for llama.cpp\n",
        f"`{gguf['file']}` ({gguf['type']}, architecture `{gguf['arch']}`, splitter "
        f"`{gguf['splitter']}`), made with qlora_trainer; every figure is in `{REPORT_NAME}`.\n",
        *comparison_table(ways if report.get("rows") else {}),
        "```sh",
        "ollama create my-model -f Modelfile",
        f"llama-cli -m {gguf['file']} -cnv",
        f"{gguf['quantize']}   # a smaller one of the f16 file, with llama.cpp's own tool",
        "```\n",
    ]
    return "\n".join(lines)


def make_report(
    source: ExportSource,
    prepared: Prepared,
    merged: Merged,
    request: ProofRequest | None,
    *,
    onto: str,
) -> dict[str, Any]:
    """The content of `export_report.json`."""
    parts, kept = merged.parts, merged.kept
    dtype = dtype_name(prepared.plan.dtype)
    spec = prepared.adapter.spec
    notes = [*source.notes]
    notes += [
        f"{len(part['merge']['unchanged'])} adapted weights came out as the base's ({way}): their "
        f"update is smaller than {dtype} can tell"
        for way, part in parts.items()
        if part["merge"]["unchanged"]
    ]
    for way, part in parts.items():
        times = part["merge"]["cast_error"]["mean"]
        if dtype == "bf16" and times > 1:
            notes.append(
                f"rounding to bf16 moved the adapted weights {times:.1f} times as far as the "
                f"adapter did ({way}, mean of norms); fp16 and fp32 round less"
            )
    trained_on = read_json(source.adapter_folder / CONFIG_NAME).get("base_model_name_or_path")
    if trained_on and last_part(trained_on) != last_part(source.base_source):
        notes.append(
            f"the adapter's file says it was trained on {last_part(trained_on)}; it was merged "
            f"with {last_part(source.base_source)}, whose weights have the same names and shapes"
        )
    if prepared.plan.left_out:
        notes.append(
            f"left out, of no use to this model class: {', '.join(prepared.plan.left_out)}"
        )
    if prepared.config_changes.get("tie_word_embeddings") is False:
        notes.append("embedding and head are no longer tied: the adapter made them differ")
    proven = next(iter(parts[kept]["proof"].values())) if request is not None else None
    return {
        "format": 1,
        "base": {"name": base_name(source.base_source), "revision": source.revision},
        "adapter": {"rank": spec.rank, "alpha": spec.alpha, "rslora": spec.rslora},
        "architecture": prepared.architecture,
        "auto_class": auto_class_name(prepared.architecture),
        "dtype": dtype,
        "asked_onto": onto,
        "kept": kept,
        "reason": merged.reason,
        "rows": None
        if request is None or proven is None
        else {
            "from": request.rows_from,
            "positions": int(proven["figures"]["positions"]),
            "by": merged.holding.export,
            "base_by": merged.holding.reference,
        },
        "ways": parts,
        "notes": notes,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def write_report(folder: Path, report: dict[str, Any], card: str) -> None:
    """Write `export_report.json` and the model card."""
    (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
