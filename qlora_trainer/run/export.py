"""From a run folder or an adapter folder to a merged checkpoint, an adapter or a GGUF file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

from qlora_trainer.config.read import read_run_file
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.data.dataset import EncodedDataset
from qlora_trainer.errors import UserError
from qlora_trainer.export.adapter_export import export_adapter
from qlora_trainer.export.export import Exported, ExportSource, builtin_proof, export_merged
from qlora_trainer.export.gguf_export import export_gguf
from qlora_trainer.export.proof import ProofRequest
from qlora_trainer.lora.peft_config import CONFIG_NAME, read_json
from qlora_trainer.run.foresee import run_for_model
from qlora_trainer.run.report import Reporter
from qlora_trainer.training import setup

Format = Literal["merged", "adapter", "gguf"]
_PROOF_ROWS = 32


@dataclass(frozen=True)
class Opened:
    """An adapter found, with its base and what is known of its training.

    Attributes:
        run: The settings; of a bare adapter folder, the defaults on its base.
        source: The base.
        export: What the export takes.
        trained_here: Whether a run folder tells how the adapter was trained.
    """

    run: RunConfig
    source: setup.ModelSource
    export: ExportSource
    trained_here: bool


def export_run(
    folder: str | Path,
    out: str | Path,
    *,
    format: Format = "merged",
    dtype: str = "fp16",
    onto: str = "best",
    gguf_type: str = "f16",
    base: str | None = None,
    prove: bool = True,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Exported:
    """Export what was trained, proven against base + adapter.

    Args:
        folder: A run folder, or an adapter in PEFT's format.
        out: The folder that shall appear; whole, or not at all.
        format: A merged checkpoint, the adapter, or a GGUF file.
        dtype: Of the merged checkpoint: "fp16", "bf16" or "fp32".
        onto: "original", "dequantized", or "best" of the two.
        gguf_type: "f16", "q8_0" or "q4_0".
        base: The base of a bare adapter folder, where its own note of it does not hold here.
        prove: Compare in a fresh process, and refuse what is not the model that was trained.
        overwrite: Whether `out` may be replaced.
        reporter: Told what happens.

    Raises:
        UserError: Anything that keeps the export from being whole, right and proven.
    """
    told = reporter or Reporter()
    opened = open_export(Path(folder), base)
    if format == "adapter":
        return export_adapter(opened.export, Path(out), overwrite=overwrite)
    proof = _proof(opened) if prove else None

    def progress(_: str, done: int, total: int) -> None:
        told.progress("writing", done, total)

    if format == "gguf":
        return export_gguf(
            opened.export, Path(out), kind=gguf_type, onto=onto, proof=proof,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
    return export_merged(
        opened.export, Path(out), dtype=dtype, onto=onto, proof=proof,
        overwrite=overwrite, progress=progress,
    )  # fmt: skip


def open_export(folder: Path, base: str | None = None) -> Opened:
    """Find an adapter and its base.

    Raises:
        UserError: The folder is neither a finished run nor an adapter, or its base is not there.
    """
    trained_here = (folder / "run.yaml").is_file() and (folder / "adapter").is_dir()
    if trained_here:
        changes = [f"model.source={base}"] if base else []
        run, adapter = read_run_file(folder / "run.yaml", changes), folder / "adapter"
    elif (folder / CONFIG_NAME).is_file():
        named = base or read_json(folder / CONFIG_NAME).get("base_model_name_or_path")
        if not named:
            raise UserError(f"{folder / CONFIG_NAME}: names no base; name it with --base")
        run, adapter = run_for_model(str(named)), folder
    else:
        raise UserError(f"{folder}: is neither a finished run nor an adapter ({CONFIG_NAME})")
    source = setup.open_model(run)
    export = ExportSource(
        base_folder=source.resolved.folder,
        adapter_folder=adapter,
        model_class=AutoModelForCausalLM,
        spec=source.base_spec,
        base_source=run.model.source,
        revision=source.resolved.revision,
    )
    return Opened(run, source, export, trained_here)


def _proof(opened: Opened) -> ProofRequest:
    """Held-out rows of the run where there are any, otherwise built-in text."""
    device = opened.source.device
    has_rows = opened.run.data.eval or opened.run.data.eval_fraction
    if not (opened.trained_here and has_rows):
        return builtin_proof(opened.export, device=device)
    held_out = setup.open_data(opened.run, opened.source).held_out
    assert held_out is not None
    return ProofRequest(rows=_rows(held_out), device=device)


def _rows(held_out: EncodedDataset) -> Sequence[dict[str, Any]]:
    return [
        {
            "input_ids": torch.from_numpy(held_out.input_ids(index).astype("int64")),
            "labels": torch.from_numpy(held_out.labels(index)),
        }
        for index in range(min(len(held_out), _PROOF_ROWS))
    ]
