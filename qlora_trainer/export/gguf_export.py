"""A GGUF file for llama.cpp and Ollama: merge, prove the merge, convert, prove the file.

The file is read back by transformers' own GGUF reader in a fresh process and compared with base +
adapter like any export; storing weights in 8 or 4 bits is allowed its own further distance.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.base.device_memory import Memory, memory_left
from qlora_trainer.base.dtype import overflows_in_fp16
from qlora_trainer.base.load import load_config
from qlora_trainer.base.machine import host_memory_bytes
from qlora_trainer.errors import UserError
from qlora_trainer.export.candidates import disk_bytes, merge_and_prove
from qlora_trainer.export.export import Exported
from qlora_trainer.export.folder import building, check_disk, check_target
from qlora_trainer.export.fresh import compare_in_fresh_process
from qlora_trainer.export.holding import (
    Held,
    beside_weights_bytes,
    choose_export_holding,
)
from qlora_trainer.export.merge import Progress
from qlora_trainer.export.merged import Prepared, prepare
from qlora_trainer.export.ollama import modelfile, quantize_line, read_chat_template
from qlora_trainer.export.proof import ProofRequest, check_limits, chosen_rows
from qlora_trainer.export.report import base_name, gguf_card, make_report, write_report
from qlora_trainer.export.source import ExportSource
from qlora_trainer.units import format_bytes

# Mean KL divergence in nats that storing in fewer bits may add.
FURTHER_KL = {"f16": 0.0, "q8_0": 0.02, "q4_0": 0.5}


def export_gguf(
    source: ExportSource,
    out: Path,
    *,
    kind: str = "f16",
    onto: str = "best",
    proof: ProofRequest | None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a folder with a GGUF file, an Ollama `Modelfile`, the report and a card.

    Args:
        source: Base and adapter.
        out: The folder that shall appear.
        kind: "f16", "q8_0" or "q4_0".
        onto: As for `export_merged`.
        proof: What is compared; None leaves the proof out, and the report says so.
        overwrite: Whether a folder that stands at `out` may be replaced.
        progress: Called with (tensor, bytes written, bytes in all) of one way of merging.

    Raises:
        UserError: The `gguf` package is missing, the model is not covered, or anything that keeps
            the file from being whole, right and proven.
    """
    check_target(out, overwrite=overwrite, sources=source.folders)
    try:
        from qlora_trainer.export.gguf_file import check_covered, write_gguf
        from qlora_trainer.export.gguf_tokenizer import check_tokenizer
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise UserError(
            "--format gguf: needs the gguf package; pip install 'qlora-trainer[gguf]'"
        ) from None
    check_covered(source.base_folder, kind, trust_remote_code=source.spec.trust_remote_code)
    own = (source.adapter_folder / "tokenizer.json").is_file()
    check_tokenizer(source.adapter_folder if own else source.base_folder)
    config = load_config(source.base_folder, trust_remote_code=source.spec.trust_remote_code)
    # The file's weights are fp16, llama.cpp computes in fp32; only the proof would overflow.
    dtype = "fp32" if overflows_in_fp16(config.model_type) else "fp16"
    prepared = prepare(
        source.base_folder, source.adapter_folder, source.model_class, source.spec,
        dtype=dtype, config_changes=source.config_changes,
    )  # fmt: skip
    ways = prepared.ways(onto, proven=proof is not None)
    check_disk(out, disk_bytes(source, prepared, proof, copies=len(ways) + 1))
    if proof is not None:
        _check_memory(prepared)
    name = base_name(source.base_source).rpartition("/")[2]
    file_name = f"{name}-{kind}.gguf"
    with building(out, overwrite=overwrite) as folder:
        merged = merge_and_prove(source, prepared, ways, folder, proof, progress=progress)
        plain_folder = folder / merged.kept
        figures = write_gguf(plain_folder, folder / file_name, kind, name=name)
        part: dict[str, Any] = {"file": file_name, "type": kind, **dataclasses.asdict(figures)}
        if proof is not None and merged.references is not None:
            part["proof"] = compare_in_fresh_process(
                folder, merged.references, proof, precision=proof.precisions[0],
                trust_remote_code=False, by=_choose_holding(prepared, proof), gguf_file=file_name,
                config_folder=None if figures.own_metadata else plain_folder,
            )  # fmt: skip
            part["proof"].pop("token_ids")
            limit = merged.parts[merged.kept]["limit_mean_kl"] + FURTHER_KL[kind]
            fault = check_limits(part["proof"]["figures"], f"{merged.kept}, as {kind}", limit)
            if fault is not None:
                raise UserError(f"the GGUF file is not the model that was trained; {fault}")
        report = make_report(source, prepared, merged, proof, onto=onto)
        part["quantize"] = quantize_line(name)
        report["gguf"] = part
        text = modelfile(file_name, read_chat_template(plain_folder))
        (folder / "Modelfile").write_text(text, encoding="utf-8")
        _remove_folders(folder)
        write_report(folder, report, gguf_card(report))
    return Exported(out, report)


def _remove_folders(folder: Path) -> None:
    for entry in list(folder.iterdir()):
        if entry.is_dir():
            shutil.rmtree(entry)


def _check_memory(prepared: Prepared) -> None:
    """Transformers' GGUF reader unpacks the whole file into float32."""
    needed, available = _unpacked_bytes(prepared), host_memory_bytes()[1]
    if needed > available:
        raise UserError(
            f"reading the GGUF file back to prove it needs about {format_bytes(needed)} of memory, "
            f"{format_bytes(available)} are available; close other programs, or leave the proof "
            "out (--no-proof)"
        )


def _choose_holding(prepared: Prepared, request: ProofRequest) -> Held:
    """How a GPU takes the file; host memory holds all of it in any case (`_check_memory`)."""
    card = 0
    if request.device.type == "cuda":
        rows = chosen_rows(request, prepared.widest)
        beside = beside_weights_bytes(rows, prepared.widest, torch.float32)
        card = _unpacked_bytes(prepared) + beside
    left = memory_left(request.device)
    return choose_export_holding(request, "the GGUF file", Memory(0, card), left)


def _unpacked_bytes(prepared: Prepared) -> int:
    return 4 * sum(elements for elements, _ in prepared.held.values())
