"""Candidates for an export: written, compared with base + adapter, and one of them chosen."""

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.base.device_memory import memory_left
from qlora_trainer.errors import UserError
from qlora_trainer.export.choices import Onto
from qlora_trainer.export.companions import companion_bytes
from qlora_trainer.export.fresh import compare_in_fresh_process
from qlora_trainer.export.holding import (
    Holding,
    beside_weights_bytes,
    choose_holding,
    export_needs,
    reference_needs,
)
from qlora_trainer.export.merge import MergeFigures, Progress
from qlora_trainer.export.merged import Prepared, write_candidate
from qlora_trainer.export.proof import (
    ProofRequest,
    check_limits,
    chosen_rows,
    reference_bytes,
)
from qlora_trainer.export.reference import References, write_references
from qlora_trainer.export.shards import DEFAULT_SHARD_BYTES
from qlora_trainer.export.source import ExportSource


@dataclass(frozen=True)
class Merged:
    """Candidates in a folder, compared.

    Attributes:
        parts: Way -> its part of the report.
        kept: The way that was chosen; its folder has that name.
        reason: Why, in words.
        references: What it was compared with, in the first precision.
        holding: How the comparison held the two models.
    """

    parts: dict[str, Any]
    kept: Onto
    reason: str
    references: References | None
    holding: Holding


def disk_bytes(
    source: ExportSource, prepared: Prepared, proof: ProofRequest | None, copies: int
) -> int:
    """Disk an export takes while it is made, with so many copies of the weights."""
    logits = 2 * reference_bytes(proof, prepared.widest)
    beside = companion_bytes(source.base_folder, source.adapter_folder)
    return prepared.size_bytes * copies + logits + beside


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
        UserError: The chosen one is not the model that was trained, or there is too little memory
            to find out.
    """
    holding = Holding()
    if proof is not None:
        proof = dataclasses.replace(proof, rows=chosen_rows(proof, prepared.widest))
        holding = _choose_holding(source, prepared, proof)
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
        references = _prove(source, prepared, folder, parts, proof, holding)
    kept, reason = _choose(parts)
    _refuse_failed(parts, kept)
    return Merged(parts, kept, reason, references, holding)


def _choose_holding(source: ExportSource, prepared: Prepared, request: ProofRequest) -> Holding:
    elements = sum(count for count, _ in prepared.held.values())
    dtype = max(source.spec.compute_dtype, prepared.plan.dtype, key=lambda dtype: dtype.itemsize)
    if "fp32" in request.precisions:
        dtype = torch.float32
    beside = beside_weights_bytes(request.rows, prepared.widest, dtype)
    device, precisions = request.device, request.precisions
    return choose_holding(
        request,
        reference_needs(prepared.held, source.spec, precisions, device, beside),
        export_needs(elements, prepared.plan.dtype, precisions, device, beside),
        memory_left(device),
        by_layer_possible=not prepared.base.is_packed,
    )


def _merge_part(figures: MergeFigures, seconds: float) -> dict[str, Any]:
    errors, others = figures.cast_errors, figures.own_cast_errors
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
            # Of tensors without an update: what the cast took, over the tensor's own norm.
            "cast_error_of_others": {
                "tensors": len(others),
                "worst": max(others.values(), default=0.0),
                "worst_tensor": max(others, key=lambda name: others[name], default=None),
            },
        }
    }


def _prove(
    source: ExportSource,
    prepared: Prepared,
    folder: Path,
    parts: dict[str, Any],
    request: ProofRequest,
    holding: Holding,
) -> References:
    """Compare every candidate in every precision; the figures go into `parts`."""
    kept: References | None = None
    for precision in request.precisions:
        place = Path(tempfile.mkdtemp(prefix="reference-", dir=folder))
        request.say(f"running base + adapter ({precision})")
        references = write_references(
            place, source, prepared.adapter, request, request.rows, precision=precision,
            by=holding.reference,
        )  # fmt: skip
        for way, part in parts.items():
            request.say(f"running the export merged onto {way} in a new process ({precision})")
            part.setdefault("proof", {})[precision] = compare_in_fresh_process(
                folder / way,
                references,
                request,
                precision=precision,
                trust_remote_code=source.spec.trust_remote_code,
                by=holding.export,
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
    expected = [list(ids) for ids in request.token_ids]
    for part in parts.values():
        for proof in part["proof"].values():
            found = proof.pop("token_ids")
            if expected and found != expected and prepared.adapter.vocabulary is None:
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
