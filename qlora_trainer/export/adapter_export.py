"""Exporting the adapter itself, and several joined into one merged model.

The adapter goes out only after it was found to fit its base with finite values, together with the
tokenizer it was trained with, what servers cannot do with it, and how to load it.
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_trainer.export.adapter import fit_adapter
from qlora_trainer.export.combine import combine_adapters
from qlora_trainer.export.companions import copy_tokenizer
from qlora_trainer.export.export import Exported, export_merged
from qlora_trainer.export.folder import building, check_disk, check_target
from qlora_trainer.export.merge import Progress
from qlora_trainer.export.merged import plain_model
from qlora_trainer.export.proof import ProofRequest
from qlora_trainer.export.report import REPORT_NAME, base_name
from qlora_trainer.export.serving import ServingNote, serving_notes
from qlora_trainer.export.source import ExportSource
from qlora_trainer.lora.files import WEIGHTS_NAME
from qlora_trainer.lora.kind import kind_of
from qlora_trainer.lora.peft_config import CONFIG_NAME
from qlora_trainer.lora.select import select_modules
from qlora_trainer.lora.spec import AdapterSpec

HEADS = ("lm_head.weight", "embed_out.weight")


def notes_for(source: ExportSource) -> list[ServingNote]:
    """What servers cannot do with an adapter that exists already.

    Raises:
        UserError: The adapter is broken or of another base.
    """
    plain = plain_model(source.base_folder, source.model_class, source.spec, source.config_changes)
    spec = fit_adapter(source.adapter_folder, plain.model).spec
    return planned_notes(plain.model, spec)


def planned_notes(model: Any, spec: AdapterSpec) -> list[ServingNote]:
    """What servers cannot do with such an adapter on such a model.

    Args:
        model: The base, with or without weights; no adapter on it.
        spec: The adapter.
    """
    adapted = select_modules(model, spec, strict=False)
    tied: dict[str, str] = dict(model.all_tied_weights_keys)
    return serving_notes(
        rank=spec.rank,
        kinds=sorted({k.name for name in adapted if (k := kind_of(model.get_submodule(name)))}),
        modules_to_save=spec.modules_to_save,
        rank_pattern=[spec.rank_of(name) for name in adapted],
        alpha_pattern=bool(spec.alpha_pattern),
        rslora=spec.rslora,
        adapts_head=any(f"{name}.weight".endswith(HEADS) for name in adapted),
        tied_head=any(name.endswith(HEADS) for name in (*tied, *tied.values())),
    )


def export_adapter(source: ExportSource, out: Path, *, overwrite: bool = False) -> Exported:
    """Write the adapter with its tokenizer, checked against the base.

    Args:
        source: Base and adapter.
        out: The folder that shall appear.
        overwrite: Whether a folder that stands at `out` may be replaced.

    Raises:
        UserError: The adapter is broken or of another base, or `out` cannot be written.
    """
    check_target(out, overwrite=overwrite, sources=source.folders)
    notes = notes_for(source)
    files = [entry for entry in sorted(source.adapter_folder.iterdir()) if entry.is_file()]
    check_disk(out, sum(file.stat().st_size for file in files))
    base = base_name(source.base_source)
    with building(out, overwrite=overwrite) as folder:
        copy_tokenizer(source.base_folder, source.adapter_folder, folder)
        # config.json, where there is one, names the labels in the order of the head
        for name in (WEIGHTS_NAME, CONFIG_NAME, "config.json", "README.md"):
            if (source.adapter_folder / name).is_file():
                shutil.copyfile(source.adapter_folder / name, folder / name)
        settings = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        settings.update(base_model_name_or_path=source.base_source, revision=source.revision)
        (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        report = {
            "format": 1,
            "kept": "adapter",
            "base": {"name": base, "revision": source.revision},
            "serving": [str(note) for note in notes],
            "notes": list(source.notes),
        }
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if not (folder / "README.md").is_file():
            card = _card(base, source.model_class.__name__, notes)
            (folder / "README.md").write_text(card, encoding="utf-8")
    return Exported(out, report)


def _card(base: str, auto: str, notes: Sequence[ServingNote]) -> str:
    lines = [
        f"---\nbase_model: {base}\nlibrary_name: peft\ntags: [qlora, lora, qlora_trainer]\n---\n",
        f"# Adapter for {base}\n",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {auto}",
        f'base = {auto}.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
        "```\n",
        *(["## Serving\n", *(f"- {note}" for note in notes), ""] if notes else []),
    ]
    return "\n".join(lines)


def merge_adapters(
    source: ExportSource,
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    *,
    format: str = "merged",
    dtype: str = "auto",
    onto: str = "best",
    proof: ProofRequest | None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Merge several adapters, weighted, into one model, proven like any export, or one adapter.

    Args:
        source: The base; its own `adapter_folder` is not used.
        adapters: Folder and weight of each.
        out: The folder that shall appear.
        format: "merged" or "adapter".
        dtype: As for `export_merged`, and so are the rest.
        onto: "original", "dequantized" or "best".
        proof: Compared with base + all adapters.
        overwrite: Whether a folder that stands at `out` may be replaced.
        progress: Called with (tensor, bytes written, bytes in all) of one way of merging.

    Raises:
        UserError: As `combine_adapters` and `export_merged`.
    """
    folders = [folder for folder, _ in adapters]
    check_target(out, overwrite=overwrite, sources=(source.base_folder, *folders))
    with tempfile.TemporaryDirectory(prefix="qlora-joined-") as place:
        joined = Path(place, "adapter")
        combine_adapters(
            source.base_folder, adapters, joined, model_class=source.model_class,
            spec=source.spec, config_changes=source.config_changes,
        )  # fmt: skip
        copy_tokenizer(None, folders[0], joined)
        said = " + ".join(f"{weight:g} x {folder.name}" for folder, weight in adapters)
        together = dataclasses.replace(
            source, adapter_folder=joined,
            notes=(*source.notes, f"joined adapters: {said}, tokenizer of the first"),
        )  # fmt: skip
        if format == "adapter":
            return export_adapter(together, out, overwrite=overwrite)
        return export_merged(
            together, out, dtype=dtype, onto=onto, proof=proof, overwrite=overwrite,
            progress=progress,
        )  # fmt: skip
