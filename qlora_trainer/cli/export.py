"""Exporting what was trained: `qlora export`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qlora_trainer.errors import UserError


class ExportFormat(StrEnum):
    """What `qlora export` writes."""

    merged = "merged"
    adapter = "adapter"
    gguf = "gguf"


class ExportDtype(StrEnum):
    """Precision of a merged checkpoint."""

    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


class Onto(StrEnum):
    """Weights an adapter is merged onto."""

    original = "original"
    dequantized = "dequantized"
    best = "best"


class GgufType(StrEnum):
    """Types of GGUF files."""

    f16 = "f16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="run or PEFT adapter folder")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    format: Annotated[ExportFormat, typer.Option(help="what to write")] = ExportFormat.merged,
    dtype: Annotated[ExportDtype, typer.Option(help="of the merged weights")] = ExportDtype.fp16,
    onto: Annotated[Onto, typer.Option(help="weights to merge onto; best tries both")] = Onto.best,
    gguf_type: Annotated[GgufType, typer.Option(help="of a GGUF file")] = GgufType.f16,
    base: Annotated[str | None, typer.Option(help="base of a bare adapter folder")] = None,
    proof: Annotated[bool, typer.Option(help="compare the export in a fresh process")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a folder")] = False,
) -> None:
    """Export a merged checkpoint, the adapter or a GGUF file, proven against base + adapter."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    from qlora_trainer.cli.show import ConsoleReporter
    from qlora_trainer.cli.show_export import show_export
    from qlora_trainer.run.export import export_run

    with ConsoleReporter() as reporter:
        exported = export_run(
            folder,
            out,
            format=format.value,
            dtype=dtype.value,
            onto=onto.value,
            gguf_type=gguf_type.value,
            base=base,
            prove=proof,
            overwrite=overwrite,
            reporter=reporter,
        )
    show_export(exported)
