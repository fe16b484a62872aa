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


class ProofBy(StrEnum):
    """How much of a model the proof holds in memory."""

    auto = "auto"
    model = "model"
    layer = "layer"


class Quantization(StrEnum):
    """How training held a base."""

    nf4 = "nf4"
    none = "none"


class JoinedFormat(StrEnum):
    """What `qlora merge-adapters` writes."""

    merged = "merged"
    adapter = "adapter"


class GgufType(StrEnum):
    """Types of GGUF files."""

    f16 = "f16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


Out = Annotated[Path, typer.Option(help="folder to write")]
Dtype = Annotated[ExportDtype, typer.Option(help="of the merged weights")]
MergeOnto = Annotated[Onto, typer.Option(help="weights to merge onto; best tries both")]
Base = Annotated[str | None, typer.Option(help="the base, where the adapter's note does not hold")]
HeldIn = Annotated[
    Quantization, typer.Option(help="how a bare adapter's base was held in training")
]
Proof = Annotated[bool, typer.Option(help="compare the export in a fresh process")]
By = Annotated[ProofBy, typer.Option(help="compare the model whole, or layer by layer")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace a folder")]


def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="run or PEFT adapter folder")],
    out: Out,
    format: Annotated[ExportFormat, typer.Option(help="what to write")] = ExportFormat.merged,
    dtype: Dtype = ExportDtype.fp16,
    onto: MergeOnto = Onto.best,
    gguf_type: Annotated[GgufType, typer.Option(help="of a GGUF file")] = GgufType.f16,
    base: Base = None,
    quantization: HeldIn = Quantization.nf4,
    proof: Proof = True,
    proof_by: By = ProofBy.auto,
    overwrite: Overwrite = False,
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
            quantization=quantization.value,
            prove=proof,
            proof_by=proof_by.value,
            overwrite=overwrite,
            reporter=reporter,
        )
    show_export(exported)


def merge_adapters(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER[=WEIGHT]...", help="run or PEFT adapter folders"),
    ],
    out: Out,
    format: Annotated[JoinedFormat, typer.Option(help="what to write")] = JoinedFormat.merged,
    dtype: Dtype = ExportDtype.fp16,
    onto: MergeOnto = Onto.best,
    base: Base = None,
    quantization: HeldIn = Quantization.nf4,
    proof: Proof = True,
    proof_by: By = ProofBy.auto,
    overwrite: Overwrite = False,
) -> None:
    """Merge several adapters of one base: the sum of WEIGHT (default 1) x scale x B A, exactly."""
    named = [weighted(text) for text in adapters]
    from qlora_trainer.cli.show import ConsoleReporter
    from qlora_trainer.cli.show_export import show_export
    from qlora_trainer.run.export import merge_adapter_folders

    with ConsoleReporter() as reporter:
        exported = merge_adapter_folders(
            named,
            out,
            format=format.value,
            dtype=dtype.value,
            onto=onto.value,
            base=base,
            quantization=quantization.value,
            prove=proof,
            proof_by=proof_by.value,
            overwrite=overwrite,
            reporter=reporter,
        )
    show_export(exported)


def weighted(text: str) -> tuple[Path, float]:
    """Folder and weight of `ADAPTER[=WEIGHT]`.

    Raises:
        UserError: No such folder, or the weight is no number.
    """
    name, sign, number = text.rpartition("=")
    if not sign or Path(text).is_dir():
        name, number = text, "1"
    if not Path(name).is_dir():
        raise UserError(f"{name}: no such folder")
    try:
        return Path(name), float(number)
    except ValueError:
        raise UserError(f"{text}: the weight {number!r} is not a number") from None
