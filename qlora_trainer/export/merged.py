"""From a base and an adapter to a folder plain transformers opens: prepare, then write.

`prepare` finds every fault that can be found without reading values; `write_candidate` fills a
folder. What is kept, proven and reported is `export`'s to decide.
"""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.base.dtype import overflows_in_fp16
from qlora_trainer.base.load import BaseSpec, build_weightless_base, load_config
from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.errors import UserError
from qlora_trainer.export.adapter import FittedAdapter, fit_adapter
from qlora_trainer.export.checkpoint import MappedCheckpoint
from qlora_trainer.export.choices import Onto
from qlora_trainer.export.companions import add_stop_ids, copy_companions, write_config
from qlora_trainer.export.merge import MergeFigures, Progress, write_merged
from qlora_trainer.export.plan import Plan, plan_export
from qlora_trainer.export.rows import Quantization

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Prepared:
    """Everything an export needs, checked.

    Attributes:
        base: The base's tensors.
        adapter_folder: Where the adapter is.
        adapter: Fitted to the base.
        plan: What is written.
        architecture: Name of the model class.
        quantization: How training held the base, or None where it was not in NF4.
        config_changes: What `config.json` must say differently.
        stop_ids: Tokens that end an answer besides those the base knows.
    """

    base: MappedCheckpoint
    adapter_folder: Path
    adapter: FittedAdapter
    plan: Plan
    architecture: str
    quantization: Quantization | None
    config_changes: dict[str, Any]
    stop_ids: tuple[int, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights to be written."""
        sizes = (torch.Size(t.shape).numel() * t.dtype.itemsize for t in self.plan.tensors)
        return sum(sizes)

    @property
    def held(self) -> dict[str, tuple[int, bool]]:
        """Name -> (elements, whether training held it in NF4)."""
        return {t.name: (torch.Size(t.shape).numel(), t.quantized) for t in self.plan.tensors}

    @property
    def widest(self) -> int:
        """Rows of the tallest matrix: at least as many as a head has outputs."""
        return max((t.shape[0] for t in self.plan.tensors if len(t.shape) == 2), default=1)

    def ways(self, onto: str, *, proven: bool = True) -> tuple[Onto, ...]:
        """The ways of merging that were asked for and can be had.

        Args:
            onto: "original", "dequantized" or "best".
            proven: Whether a proof will choose between two.

        Raises:
            UserError: The way asked for cannot be had.
        """
        if onto not in ("original", "dequantized", "best"):
            raise UserError(f"--onto {onto}: must be original, dequantized or best")
        if self.base.is_packed:
            if onto == "original":
                raise UserError(
                    f"--onto original: {self.base.folder} holds its weights in 4 bits only, there "
                    "are no 16-bit weights to merge onto; use --onto dequantized, or name the "
                    "16-bit release of the same model as the base"
                )
            return ("dequantized",)
        if self.quantization is None:
            if onto == "dequantized":
                raise UserError(
                    "--onto dequantized: the base was trained on in 16 bit, nothing was quantized; "
                    "use --onto original"
                )
            return ("original",)
        if onto == "best":
            if not proven:
                raise UserError(
                    "--onto best: needs the proof to choose; name one way, or leave it on"
                )
            return ("original", "dequantized")
        return ("original",) if onto == "original" else ("dequantized",)


@dataclass(frozen=True)
class PlainModel:
    """A base without weights, every module as its class makes it.

    Attributes:
        model: On the `meta` device, for reading only.
        config: As the base's file has it, with the task's changes.
        architectures: Model classes the file names.
    """

    model: Any
    config: Any
    architectures: tuple[str, ...]


def plain_model(
    base_folder: Path, model_class: Any, spec: BaseSpec, config_changes: Mapping[str, Any]
) -> PlainModel:
    """Build what an adapter is fitted to.

    Args:
        base_folder: With `config.json`.
        model_class: A transformers model class or auto class, as in training.
        spec: How training held the base.
        config_changes: Settings of the model configuration the task decided.

    Raises:
        UserError: The configuration is broken, or not of this class.
    """
    config = load_config(base_folder, trust_remote_code=spec.trust_remote_code)
    for key, value in config_changes.items():
        setattr(config, key, value)
    architectures = tuple(getattr(config, "architectures", None) or ())
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    model = build_weightless_base(
        plain, model_class, dataclasses.replace(spec.plain(), quantization="none")
    )
    return PlainModel(model, config, architectures)


def export_dtype(asked: str, model_type: str) -> str:
    """The dtype a merged model is written in.

    Args:
        asked: "auto", "fp16", "bf16" or "fp32".
        model_type: transformers' name of the family.

    Raises:
        UserError: No such dtype, or fp16 for a family that overflows in it.

    >>> export_dtype("auto", "llama"), export_dtype("auto", "gemma2")
    ('fp16', 'bf16')
    """
    if asked not in ("auto", *DTYPES):
        raise UserError(f"--dtype {asked}: must be one of {', '.join(('auto', *DTYPES))}")
    overflows = overflows_in_fp16(model_type)
    if asked == "fp16" and overflows:
        raise UserError(
            f"--dtype fp16: {model_type} models overflow in fp16 and answer with NaN; "
            "use --dtype bf16"
        )
    if asked == "auto":
        return "bf16" if overflows else "fp16"
    return asked


def prepare(
    base_folder: Path,
    adapter_folder: Path,
    model_class: Any,
    spec: BaseSpec,
    *,
    dtype: str,
    config_changes: Mapping[str, Any] | None = None,
) -> Prepared:
    """Check base and adapter against each other and plan the merge.

    Args:
        base_folder: With `config.json` and safetensors.
        adapter_folder: In PEFT's format.
        model_class: A transformers model class or auto class, as in training.
        spec: How training held the base.
        dtype: "fp16", "bf16", "fp32", or "auto": fp16, and bf16 for a family that overflows in it.
        config_changes: Settings of the model configuration the task decided.

    Raises:
        UserError: The base is not whole, the adapter is broken or of another base, or the merge
            cannot be written as a plain checkpoint, or not in this dtype.
    """
    config = load_config(base_folder, trust_remote_code=spec.trust_remote_code)
    dtype = export_dtype(dtype, config.model_type)
    base = MappedCheckpoint(base_folder)
    plain = plain_model(base_folder, model_class, spec, config_changes or {})
    held = build_weightless_base(copy.deepcopy(plain.config), model_class, spec)
    quantized = {
        path: module.fan_in_fan_out
        for path, module in held.named_modules()
        if isinstance(module, NF4Linear)
    }
    model = plain.model
    adapter = fit_adapter(adapter_folder, model)
    plan = plan_export(
        model, base.tensors, adapter, quantized=quantized, dtype=DTYPES[dtype],
        base_architectures=plain.architectures,
    )  # fmt: skip
    _refuse_packed_transposed(plan)
    quantization = Quantization(spec.block_size, spec.double_quant) if quantized else None
    changes = {**(config_changes or {}), **plan.config_changes}
    return Prepared(
        base, adapter_folder, adapter, plan, type(model).__name__, quantization, changes
    )


def _refuse_packed_transposed(plan: Plan) -> None:
    faults = [t.name for t in plan.tensors if t.transposed and t.source and t.source.packed]
    if faults:
        raise UserError.from_faults(
            "GPT-2's layers packed in 4 bits cannot be unpacked; take the 16-bit release", faults
        )


def write_candidate(
    prepared: Prepared,
    folder: Path,
    onto: Onto,
    *,
    max_shard_bytes: int,
    progress: Progress | None = None,
) -> MergeFigures:
    """Fill a folder with the merged model: weights, configuration, everything beside them."""
    figures = write_merged(
        prepared.plan,
        prepared.base,
        folder,
        onto=onto,
        quantization=prepared.quantization or Quantization(),
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )
    copy_companions(prepared.base.folder, prepared.adapter_folder, folder)
    write_config(
        prepared.base.folder,
        folder,
        architecture=prepared.architecture,
        dtype=prepared.plan.dtype,
        changes=prepared.config_changes,
    )
    add_stop_ids(folder, prepared.stop_ids)
    return figures
