"""Exporting what was trained: `qlora export`."""

from pathlib import Path
from typing import Annotated

import typer

from qlora_trainer.errors import UserError
from qlora_trainer.export import choices

Out = Annotated[Path, typer.Option(help="folder to write")]
Dtype = Annotated[
    choices.Dtype,
    typer.Option(help="of the merged weights; auto: fp16, bf16 for Gemma and T5"),
]
MergeOnto = Annotated[
    choices.AskedOnto, typer.Option(help="weights to merge onto; best tries both")
]
Base = Annotated[str | None, typer.Option(help="the base, where the adapter's note does not hold")]
HeldIn = Annotated[
    choices.Quantization, typer.Option(help="how a bare adapter's base was held in training")
]
Proof = Annotated[bool, typer.Option(help="compare the export in a fresh process")]
By = Annotated[choices.By, typer.Option(help="compare the model whole, or layer by layer")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace a folder")]


def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="run or PEFT adapter folder")],
    out: Out,
    format: Annotated[choices.Format, typer.Option(help="what to write")] = "merged",
    dtype: Dtype = "auto",
    onto: MergeOnto = "best",
    gguf_type: Annotated[choices.GgufType, typer.Option(help="of a GGUF file")] = "f16",
    base: Base = None,
    quantization: HeldIn = "nf4",
    proof: Proof = True,
    proof_by: By = "auto",
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
            folder, out, format=format, dtype=dtype, onto=onto, gguf_type=gguf_type, base=base,
            quantization=quantization, prove=proof, proof_by=proof_by, overwrite=overwrite,
            reporter=reporter,
        )  # fmt: skip
    show_export(exported)


def merge_adapters(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER[=WEIGHT]...", help="run or PEFT adapter folders"),
    ],
    out: Out,
    format: Annotated[choices.JoinedFormat, typer.Option(help="what to write")] = "merged",
    dtype: Dtype = "auto",
    onto: MergeOnto = "best",
    base: Base = None,
    quantization: HeldIn = "nf4",
    proof: Proof = True,
    proof_by: By = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Merge several adapters of one base: the sum of WEIGHT (default 1) x scale x B A, exactly."""
    named = [weighted(text) for text in adapters]
    from qlora_trainer.cli.show import ConsoleReporter
    from qlora_trainer.cli.show_export import show_export
    from qlora_trainer.run.export import merge_adapter_folders

    with ConsoleReporter() as reporter:
        exported = merge_adapter_folders(
            named, out, format=format, dtype=dtype, onto=onto, base=base,
            quantization=quantization, prove=proof, proof_by=proof_by, overwrite=overwrite,
            reporter=reporter,
        )  # fmt: skip
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
