"""From a run folder or an adapter folder to a merged checkpoint, an adapter or a GGUF file."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.base.dtype import choose_compute_dtype
from qlora_trainer.base.fingerprint import base_fingerprint
from qlora_trainer.base.hub import resolve_model
from qlora_trainer.base.load import BaseSpec, load_config
from qlora_trainer.base.machine import choose_device
from qlora_trainer.config.read import read_run_file
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.data.dataset import EncodedDataset
from qlora_trainer.errors import UserError
from qlora_trainer.export.adapter_export import export_adapter, merge_adapters
from qlora_trainer.export.choices import By, Format, JoinedFormat
from qlora_trainer.export.export import Exported, builtin_proof, export_merged
from qlora_trainer.export.folder import check_target
from qlora_trainer.export.gguf_export import export_gguf
from qlora_trainer.export.proof import ProofRequest
from qlora_trainer.export.source import ExportSource, last_part
from qlora_trainer.lora.peft_config import CONFIG_NAME, adapter_in, read_json
from qlora_trainer.run.adapter_task import adapter_class, label_settings
from qlora_trainer.run.report import Reporter
from qlora_trainer.run.stops import learned_stop_ids
from qlora_trainer.training import setup
from qlora_trainer.training.environment import base_trained_on

_PROOF_ROWS = 32
_MEGABYTE = 10**6


@dataclass(frozen=True)
class Opened:
    """An adapter found, with its base and what is known of its training.

    Attributes:
        export: What the export takes.
        device: Where models run.
        run: The settings it was trained with; None for a bare adapter folder.
        source: The base as the run opens it; None for a bare adapter folder.
    """

    export: ExportSource
    device: torch.device
    run: RunConfig | None = None
    source: setup.ModelSource | None = None


def export_run(
    folder: str | Path,
    out: str | Path,
    *,
    format: Format = "merged",
    dtype: str = "auto",
    onto: str = "best",
    gguf_type: str = "f16",
    base: str | None = None,
    quantization: str = "nf4",
    prove: bool = True,
    proof_by: By = "auto",
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Exported:
    """Export what was trained, proven against base + adapter.

    Args:
        folder: A run folder, or an adapter in PEFT's format, of any task.
        out: The folder that shall appear; whole, or not at all.
        format: A merged checkpoint, the adapter, or a GGUF file.
        dtype: Of the merged checkpoint: "auto", "fp16", "bf16" or "fp32".
        onto: "original", "dequantized", or "best" of the two.
        gguf_type: "f16", "q8_0" or "q4_0".
        base: The base of a bare adapter folder, where its own note of it does not hold here.
        quantization: How the base of a bare adapter folder was held in training, "nf4" or "none";
            a run folder knows.
        prove: Compare in a fresh process, and refuse what is not the model that was trained.
        proof_by: Hold the whole "model" for it or one "layer" at a time; "auto" by free memory.
        overwrite: Whether `out` may be replaced.
        reporter: Told what happens.

    Raises:
        UserError: Anything that keeps the export from being whole, right and proven.
    """
    told, out = reporter or Reporter(), Path(out)
    _check_choices(format, dtype, gguf_type)
    check_target(out, overwrite=overwrite, sources=(Path(folder),))
    opened = open_export(Path(folder), base, quantization=quantization, reporter=told)
    if format == "adapter":
        return export_adapter(opened.export, out, overwrite=overwrite)
    proof = held_out_proof(opened, proof_by, told) if prove else None
    if format == "gguf":
        return export_gguf(
            opened.export, out, kind=gguf_type, onto=onto, proof=proof,
            overwrite=overwrite, progress=_bytes_written(told),
        )  # fmt: skip
    return export_merged(
        opened.export, out, dtype=dtype, onto=onto, proof=proof,
        overwrite=overwrite, progress=_bytes_written(told),
    )  # fmt: skip


def _check_choices(format: str, dtype: str, gguf_type: str) -> None:
    """Refuse what was asked for and would have no effect."""
    faults = []
    if gguf_type != "f16" and format != "gguf":
        faults.append(f"--gguf-type {gguf_type}: needs --format gguf, not {format}")
    if dtype not in ("auto", "fp16") and format == "gguf":
        faults.append(f"--dtype {dtype}: a GGUF file has types of its own; name its --gguf-type")
    if dtype not in ("auto", "fp16") and format == "adapter":
        faults.append(f"--dtype {dtype}: an adapter goes out as it was trained; leave it out")
    if faults:
        raise UserError.from_faults("these choices have no effect together", faults)


def merge_adapter_folders(
    adapters: Sequence[tuple[str | Path, float]],
    out: str | Path,
    *,
    format: JoinedFormat = "merged",
    dtype: str = "auto",
    onto: str = "best",
    base: str | None = None,
    quantization: str = "nf4",
    prove: bool = True,
    proof_by: By = "auto",
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Exported:
    """Merge several adapters of one base, weighted, into one model or one adapter.

    The update of each weight is the sum over adapters of `weight * scale * B A`: exact, since the
    factors are put side by side. Ranks, scales and target modules may differ. Modules trained in
    full move from the base by the weighted sum of their differences from it.

    Args:
        adapters: Run or adapter folders, each with its weight.
        out: The folder that shall appear.
        format: A merged checkpoint, or one adapter that does what all do together.
        dtype: As for `export_run`, and so are the rest.
        onto: "original", "dequantized" or "best".
        base: The base of all of them, where their own notes of it do not hold here.
        quantization: "nf4" or "none".
        prove: Compare with base + all adapters.
        proof_by: "model", "layer" or "auto".
        overwrite: Whether `out` may be replaced.
        reporter: Told what happens.

    Raises:
        UserError: Adapters of different bases or tasks, or as `export_run`.
    """
    told, out = reporter or Reporter(), Path(out)
    folders = [(_adapter_folder(Path(folder)), weight) for folder, weight in adapters]
    check_target(out, overwrite=overwrite, sources=[folder for folder, _ in folders])
    if not folders:
        raise UserError("name at least two adapters to join")
    named = {
        str(folder): str(read_json(folder / CONFIG_NAME).get("base_model_name_or_path") or "")
        for folder, _ in folders
    }
    if base is None and len({last_part(name) for name in named.values()}) > 1:
        raise UserError.from_faults(
            "the adapters were trained on different bases and cannot be joined; if these are one "
            "and the same, name it with --base",
            [f"{folder}: {name or 'names none'}" for folder, name in named.items()],
        )
    opened = open_export(Path(adapters[0][0]), base, quantization=quantization, reporter=told)
    for folder, _ in adapters[1:]:
        if _is_run(Path(folder)):
            _check_base(Path(folder), opened.export.base_folder, told, asked_for=base is not None)
    proof = held_out_proof(opened, proof_by, told) if prove and format == "merged" else None
    return merge_adapters(
        opened.export, folders, out, format=format, dtype=dtype, onto=onto, proof=proof,
        overwrite=overwrite, progress=_bytes_written(told),
    )  # fmt: skip


def _bytes_written(told: Reporter) -> Callable[[str, int, int], None]:
    def progress(_: str, done: int, total: int) -> None:
        told.progress("writing weights (MB)", done // _MEGABYTE, -(-total // _MEGABYTE))

    return progress


def _is_run(folder: Path) -> bool:
    return (folder / "run.yaml").is_file() and (folder / "adapter").is_dir()


def _adapter_folder(folder: Path) -> Path:
    """The adapter itself, of a run folder or of its own.

    Raises:
        UserError: It is neither.
    """
    adapter = adapter_in(folder)
    if adapter is None:
        raise UserError(f"{folder}: is neither a finished run nor an adapter ({CONFIG_NAME})")
    return adapter


def open_export(
    folder: Path,
    base: str | None = None,
    *,
    quantization: str = "nf4",
    reporter: Reporter | None = None,
) -> Opened:
    """Find an adapter and its base.

    Raises:
        UserError: The folder is neither a finished run nor an adapter, or its base is not there
            or not the one it was trained on.
    """
    adapter = _adapter_folder(folder)
    if _is_run(folder):
        return _open_run(folder, base, reporter or Reporter())
    settings = read_json(adapter / CONFIG_NAME)
    named = base or settings.get("base_model_name_or_path")
    if not named:
        raise UserError(f"{adapter / CONFIG_NAME}: names no base; name it with --base")
    if quantization not in ("nf4", "none"):
        raise UserError(f"--quantization {quantization}: must be nf4 or none")
    device = choose_device("auto")
    in_a_folder = Path(str(named)).expanduser().is_dir()
    revision = None if base or in_a_folder else settings.get("revision")
    resolved = resolve_model(str(named), revision, trust_remote_code=False)
    config = load_config(resolved.folder)
    model_class = adapter_class(adapter, config)
    spec = BaseSpec(
        quantization, compute_dtype=choose_compute_dtype("auto", device, config.model_type)
    )
    labels, commit = label_settings(adapter, model_class, config), resolved.revision
    found = ExportSource(resolved.folder, adapter, model_class, spec, str(named), commit, labels)
    return Opened(found, device)


def _open_run(folder: Path, base: str | None, told: Reporter) -> Opened:
    instead = [f"model.source={base}", "model.revision=null"] if base else []
    run = read_run_file(folder / "run.yaml", instead)
    source = setup.open_model(run)
    _check_base(folder, source.resolved.folder, told, asked_for=base is not None)
    adapter, model_class = folder / "adapter", source.kind.auto_class
    export = ExportSource(
        source.resolved.folder, adapter, model_class, source.base_spec.plain(), run.model.source,
        source.resolved.revision, label_settings(adapter, model_class, source.config),
        stop_ids=tuple(learned_stop_ids(folder, source.tokenizer)),
    )  # fmt: skip
    return Opened(export, source.device, run, source)


def _check_base(folder: Path, base: Path, told: Reporter, *, asked_for: bool) -> None:
    """Whether the base is, byte for byte, the one that was trained on.

    Raises:
        UserError: It is not, and nobody asked for another.
    """
    if base_trained_on(folder) == base_fingerprint(base):
        return
    if not asked_for:
        raise UserError(
            f"{folder}: {base} is not the base this adapter was trained on any more; put the same "
            "release back, or name another copy of it with --base"
        )
    told.say(f"{base} has not the same files as the base this adapter was trained on")


def held_out_proof(
    opened: Opened, by: By = "auto", reporter: Reporter | None = None
) -> ProofRequest:
    """A proof on held-out rows of a causal run where there are any, otherwise on built-in inputs.

    Args:
        opened: What is exported.
        by: As for `export_run`.
        reporter: Told what the proof does.
    """
    run, source, say = opened.run, opened.source, (reporter or Reporter()).say
    built_in = builtin_proof(opened.export, device=opened.device, by=by, say=say)
    if run is None or source is None or run.task != "causal-lm":
        return built_in
    if not run.data.eval and not run.data.eval_fraction:
        return built_in
    held_out = setup.open_data(run, source).held_out
    return dataclasses.replace(built_in, rows=_rows(held_out), rows_from="held-out rows")


def _rows(held_out: EncodedDataset | None) -> Sequence[dict[str, Any]]:
    assert held_out is not None
    return [
        {
            "input_ids": torch.from_numpy(held_out.input_ids(index).astype("int64")),
            "labels": torch.from_numpy(held_out.labels(index)),
        }
        for index in range(min(len(held_out), _PROOF_ROWS))
    ]
