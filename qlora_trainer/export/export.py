"""Exporting: merge, prove, report, and only then let the folder appear.

Every function here takes plain values, raises `UserError` for what the user can mend, leaves the
sources untouched, and leaves either a complete folder under its final name or nothing.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_trainer.errors import UserError
from qlora_trainer.export.builtin import builtin_rows
from qlora_trainer.export.candidates import disk_bytes, merge_and_prove
from qlora_trainer.export.folder import building, check_disk, check_target
from qlora_trainer.export.merge import Progress
from qlora_trainer.export.merged import plain_model, prepare
from qlora_trainer.export.proof import ProofRequest
from qlora_trainer.export.reference import is_causal
from qlora_trainer.export.report import make_report, model_card, write_report
from qlora_trainer.export.shards import DEFAULT_SHARD_BYTES
from qlora_trainer.export.source import ExportSource


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        folder: Where it is.
        report: The content of its `export_report.json`.
    """

    folder: Path
    report: dict[str, Any]


def builtin_proof(source: ExportSource, **settings: Any) -> ProofRequest:
    """A proof on built-in inputs, for adapters that come without held-out rows.

    Args:
        source: What is to be exported.
        settings: Fields of `ProofRequest` to set otherwise.

    Raises:
        UserError: The model reads neither tokens nor pictures, so rows must be given.
    """
    model = plain_model(
        source.base_folder, source.model_class, source.spec, source.config_changes
    ).model
    found = builtin_rows(
        source.base_folder, model, causal=is_causal(model),
        trust_remote_code=source.spec.trust_remote_code,
    )  # fmt: skip
    if found is None:
        raise UserError(
            f"a {model.config.model_type} model reads neither text nor pictures: give held-out "
            "rows to compare on, or export without the proof (--no-proof)"
        )
    return ProofRequest(
        rows=found.rows, rows_from=found.rows_from, texts=found.texts, token_ids=found.token_ids,
        **settings,
    )  # fmt: skip


def export_merged(
    source: ExportSource,
    out: Path,
    *,
    dtype: str = "auto",
    onto: str = "best",
    proof: ProofRequest | None,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> Exported:
    """Write the merged model, proven.

    Args:
        source: Base and adapter.
        out: The folder that shall appear.
        dtype: "fp16", "bf16", "fp32", or "auto" as for `prepare`.
        onto: "original" weights of the base, "dequantized" ones as training saw them, or "best":
            both are written and compared, and the one nearer to base + adapter is kept.
        proof: What is compared; None leaves the proof out, and the report says so.
        overwrite: Whether a folder that stands at `out` may be replaced.
        max_shard_bytes: Largest weights file.
        progress: Called with (tensor, bytes written, bytes in all) of one way of merging.

    Raises:
        UserError: Anything that keeps the export from being whole, right and proven.
    """
    check_target(out, overwrite=overwrite, sources=source.folders)
    prepared = prepare(
        source.base_folder, source.adapter_folder, source.model_class, source.spec,
        dtype=dtype, config_changes=source.config_changes,
    )  # fmt: skip
    prepared = replace(prepared, stop_ids=source.stop_ids)
    ways = prepared.ways(onto, proven=proof is not None)
    check_disk(out, disk_bytes(source, prepared, proof, copies=len(ways)))
    with building(out, overwrite=overwrite) as folder:
        merged = merge_and_prove(
            source, prepared, ways, folder, proof,
            max_shard_bytes=max_shard_bytes, progress=progress,
        )  # fmt: skip
        report = make_report(source, prepared, merged, proof, onto=onto)
        _keep(folder, merged.kept)
        write_report(folder, report, model_card(report))
    return Exported(out, report)


def _keep(folder: Path, kept: str) -> None:
    for entry in list(folder.iterdir()):
        if entry.is_dir() and entry.name != kept:
            shutil.rmtree(entry)
    chosen = folder / kept
    for entry in list(chosen.iterdir()):
        entry.rename(folder / entry.name)
    chosen.rmdir()
