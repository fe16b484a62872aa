"""Exporting: merge, prove, report, and only then let the folder appear.

Every function here takes plain values, raises `UserError` for what the user can mend, leaves the
sources untouched, and leaves either a complete folder under its final name or nothing.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.base.load import BaseSpec, load_config
from qlora_trainer.errors import UserError
from qlora_trainer.export.builtin import builtin_rows
from qlora_trainer.export.folder import building, check_disk
from qlora_trainer.export.merge import MergeFigures, Onto, Progress
from qlora_trainer.export.merged import Prepared, prepare, write_candidate
from qlora_trainer.export.proof import (
    ProofRequest,
    References,
    auto_class_name,
    check_limits,
    compare_in_fresh_process,
    write_references,
)
from qlora_trainer.export.report import REPORT_NAME, base_name, model_card
from qlora_trainer.export.shards import DEFAULT_SHARD_BYTES


@dataclass(frozen=True)
class ExportSource:
    """A base and an adapter for it.

    Attributes:
        base_folder: `config.json` and safetensors.
        adapter_folder: An adapter in PEFT's format.
        model_class: The transformers class or auto class of the task.
        spec: How training held the base.
        base_source: What the user calls the base: a hub name or a folder.
        revision: Commit of a hub model.
        config_changes: Settings of the model configuration the task decided.
    """

    base_folder: Path
    adapter_folder: Path
    model_class: Any
    spec: BaseSpec
    base_source: str
    revision: str | None = None
    config_changes: Mapping[str, Any] = field(default_factory=dict)


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
    """A proof on built-in text, for adapters that come without held-out rows.

    Args:
        source: What is to be exported.
        settings: Fields of `ProofRequest` to set otherwise.

    Raises:
        UserError: The model reads no tokens, so rows must be given.
    """
    config = load_config(source.base_folder, trust_remote_code=source.spec.trust_remote_code)
    if not hasattr(config.get_text_config(), "vocab_size"):
        raise UserError(
            f"a {config.model_type} model does not read text: give held-out rows to compare on, "
            "or export without the proof"
        )
    rows, texts = builtin_rows(
        source.base_folder, config, trust_remote_code=source.spec.trust_remote_code
    )
    return ProofRequest(rows=rows, texts=texts, rows_from="built-in text", **settings)


def export_merged(
    source: ExportSource,
    out: Path,
    *,
    dtype: str = "fp16",
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
        dtype: "fp16", "bf16" or "fp32".
        onto: "original" weights of the base, "dequantized" ones as training saw them, or "best":
            both are written and compared, and the one nearer to base + adapter is kept.
        proof: What is compared; None leaves the proof out, and the report says so.
        overwrite: Whether a folder that stands at `out` may be replaced.
        max_shard_bytes: Largest weights file.
        progress: Called with (tensor, bytes written, bytes in all) of one way of merging.

    Raises:
        UserError: Anything that keeps the export from being whole, right and proven.
    """
    prepared = prepare(
        source.base_folder, source.adapter_folder, source.model_class, source.spec,
        dtype=dtype, config_changes=source.config_changes,
    )  # fmt: skip
    ways = prepared.ways(onto)
    if len(ways) > 1 and proof is None:
        raise UserError("--onto best: needs the proof to choose; name one way, or leave it on")
    check_disk(out, prepared.size_bytes * len(ways))
    with building(out, overwrite=overwrite) as folder:
        merged = merge_and_prove(
            source, prepared, ways, folder, proof,
            max_shard_bytes=max_shard_bytes, progress=progress,
        )  # fmt: skip
        report = make_report(source, prepared, merged, proof, onto=onto, dtype=dtype)
        _keep(folder, merged.kept)
        write_report(folder, report, model_card(report))
    return Exported(out, report)


@dataclass(frozen=True)
class Merged:
    """Candidates in a folder, compared.

    Attributes:
        parts: Way -> its part of the report.
        kept: The way that was chosen; its folder has that name.
        reason: Why, in words.
        references: What it was compared with, in the first precision.
    """

    parts: dict[str, Any]
    kept: Onto
    reason: str
    references: References | None


def merge_and_prove(
    source: ExportSource,
    prepared: Prepared,
    ways: tuple[Onto, ...],
    folder: Path,
    proof: ProofRequest | None,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> Merged:
    """Write every candidate into a folder of its own, compare them, choose.

    Raises:
        UserError: The chosen one is not the model that was trained.
    """
    parts: dict[str, Any] = {}
    for way in ways:
        candidate = folder / way
        candidate.mkdir()
        started = time.perf_counter()
        figures = write_candidate(
            prepared, candidate, way, max_shard_bytes=max_shard_bytes, progress=progress
        )
        parts[way] = _merge_part(figures, time.perf_counter() - started)
    references = None
    if proof is not None:
        references = _prove(source, prepared, folder, parts, proof)
    kept, reason = _choose(parts)
    _refuse_failed(parts, kept)
    return Merged(parts, kept, reason, references)


def write_report(folder: Path, report: dict[str, Any], card: str) -> None:
    """Write `export_report.json` and the model card."""
    (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def _merge_part(figures: MergeFigures, seconds: float) -> dict[str, Any]:
    errors = figures.cast_errors
    return {
        "merge": {
            "seconds": round(seconds, 2),
            "tensors": figures.tensors,
            "written_bytes": figures.written_bytes,
            "adapted": figures.adapted,
            "replaced": figures.replaced,
            "unchanged": figures.unchanged,
            # Rounding error of the cast over the size of the update, both as norms.
            "cast_error": {
                "mean": sum(errors.values()) / max(1, len(errors)),
                "worst": max(errors.values(), default=0.0),
                "worst_tensor": max(errors, key=lambda name: errors[name], default=None),
            },
        }
    }


def _prove(
    source: ExportSource,
    prepared: Prepared,
    folder: Path,
    parts: dict[str, Any],
    request: ProofRequest,
) -> References:
    """Compare every candidate in every precision; the figures go into `parts`."""
    kept: References | None = None
    for precision in request.precisions:
        place = Path(tempfile.mkdtemp(prefix="reference-", dir=folder))
        references = write_references(
            place, source.base_folder, source.adapter_folder, prepared.adapter,
            source.model_class, source.spec, request, precision=precision,
            config_changes=source.config_changes,
        )  # fmt: skip
        for way, part in parts.items():
            part.setdefault("proof", {})[precision] = compare_in_fresh_process(
                folder / way,
                references,
                request,
                precision=precision,
                trust_remote_code=source.spec.trust_remote_code,
            )
        if kept is None:
            kept = references
        else:
            shutil.rmtree(place)
    for way, part in parts.items():
        figures = part["proof"][request.precisions[0]]["figures"]
        limit = request.limits.of(way, quantized=prepared.quantization is not None)
        part["limit_mean_kl"] = limit
        part["fault"] = check_limits(figures, way, limit)
    _check_tokenizer(prepared, parts, request)
    if kept is None:
        raise ValueError("a proof needs at least one precision")
    return kept


def _check_tokenizer(prepared: Prepared, parts: Mapping[str, Any], request: ProofRequest) -> None:
    if not request.texts:
        return
    expected = [row["input_ids"].tolist() for row in request.rows]
    for part in parts.values():
        for proof in part["proof"].values():
            found = proof.pop("token_ids")
            if found != expected and prepared.adapter.vocabulary is None:
                raise UserError(
                    "the export's tokenizer gives other token ids than the base's for the same "
                    "text; the tokenizer files beside the adapter are not of this base"
                )


def _choose(parts: Mapping[str, Any]) -> tuple[Onto, str]:
    """The way that is kept, and why."""
    ways: list[Any] = list(parts)
    if len(ways) == 1:
        return ways[0], ""
    first = {way: next(iter(part["proof"].values()))["figures"] for way, part in parts.items()}
    healthy = [way for way in ways if parts[way]["fault"] is None] or ways
    kept = min(healthy, key=lambda way: first[way]["mean_kl"])
    other = next(way for way in ways if way != kept)
    reason = (
        f"Merging onto {kept} weights was kept: its mean KL divergence from base + adapter is "
        f"{first[kept]['mean_kl']:.3g}, against {first[other]['mean_kl']:.3g} onto {other}."
    )
    if first[other].get("export_loss", 0.0) < first[kept].get("export_loss", 0.0):
        reason += (
            f" The loss on the same rows was a little lower onto {other} "
            f"({first[other]['export_loss']:.4f} against {first[kept]['export_loss']:.4f})."
        )
    return kept, reason


def _refuse_failed(parts: Mapping[str, Any], kept: str) -> None:
    fault = parts[kept].get("fault")
    if fault is not None:
        raise UserError(
            f"the export is not the model that was trained, and was removed; {fault}. Check that "
            "base and adapter belong together, try --onto best, or set a higher limit"
        )


def _keep(folder: Path, kept: str) -> None:
    for entry in list(folder.iterdir()):
        if entry.is_dir() and entry.name != kept:
            shutil.rmtree(entry)
    chosen = folder / kept
    for entry in list(chosen.iterdir()):
        entry.rename(folder / entry.name)
    chosen.rmdir()


def make_report(
    source: ExportSource,
    prepared: Prepared,
    merged: Merged,
    request: ProofRequest | None,
    *,
    onto: str,
    dtype: str,
) -> dict[str, Any]:
    """The content of `export_report.json`."""
    import transformers

    parts, kept = merged.parts, merged.kept
    spec = prepared.adapter.spec
    notes = [
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
        else {"from": request.rows_from, "positions": int(proven["figures"]["positions"])},
        "ways": parts,
        "notes": notes,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
