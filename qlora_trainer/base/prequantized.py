"""Checkpoints that are quantized already: bitsandbytes' NF4 is taken over, all else is refused.

transformers' own quantizer reads them; the layers it makes are then taken over bit by bit. Which
layers those are, a weightless model learns from the same two functions of transformers.
"""

from typing import Any

import bitsandbytes
from torch import nn

from qlora_trainer.base.select import Selection, is_linear
from qlora_trainer.errors import UserError


def check_quantization(config: Any, quantization: str, source: str) -> None:
    """Refuse what cannot be held as asked.

    Args:
        config: The model's configuration.
        quantization: "nf4" or "none", as the run asks.
        source: Names the model in the message.

    Raises:
        UserError: The checkpoint is quantized in another way, or quantized where 16 bit is asked.
    """
    found = quantization_settings(config)
    if found is None:
        return
    method = str(found.get("quant_method", "unknown"))
    kind = str(found.get("bnb_4bit_quant_type", "fp4"))
    if method != "bitsandbytes" or not found.get("load_in_4bit"):
        if method == "bitsandbytes":
            method = "bitsandbytes 8-bit"
        raise UserError(
            f"{source}: the checkpoint is quantized already ({method}); only bitsandbytes nf4 can "
            "be trained on. Take the model's 16-bit release"
        )
    if kind != "nf4":
        raise UserError(
            f"{source}: the checkpoint is quantized as bitsandbytes {kind}; only nf4 can be "
            "trained on. Take the model's 16-bit release"
        )
    if quantization != "nf4":
        raise UserError(
            f"model.quantization = {quantization!r}, but {source} is quantized already (nf4); "
            "set model.quantization = nf4, or take the model's 16-bit release"
        )


def quantization_settings(config: Any) -> dict[str, Any] | None:
    """The checkpoint's own quantization settings, or None where it is not quantized."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    return dict(settings) if isinstance(settings, dict) else dict(settings.to_dict())


def is_bitsandbytes_linear(module: nn.Module) -> bool:
    """Whether it is a 4-bit layer as transformers loads one."""
    return isinstance(module, bitsandbytes.nn.Linear4bit)


def select_prequantized(model: Any) -> Selection | None:
    """The layers a quantized checkpoint holds in 4 bits, or None where it is not quantized."""
    if quantization_settings(model.config) is None:
        return None
    linear = {
        path: module
        for path, module in model.named_modules()
        if is_linear(module) or is_bitsandbytes_linear(module)
    }
    if any(is_bitsandbytes_linear(module) for module in linear.values()):
        chosen = {path for path, module in linear.items() if is_bitsandbytes_linear(module)}
    else:
        chosen = {path for path in linear if _would_be_quantized(model, path)}
    kept = {
        path: "left in 16 bit by the checkpoint"
        for path, module in model.named_modules()
        if path not in chosen and any(p.dim() > 1 for p in module.parameters(recurse=False))
    }
    return Selection(tuple(path for path in linear if path in chosen), kept)


def _would_be_quantized(model: Any, path: str) -> bool:
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    settings = quantization_settings(model.config) or {}
    skipped = settings.get("llm_int8_skip_modules")
    if skipped is None:
        skipped = get_keys_to_not_convert(model)
    skipped = [*skipped, *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    return bool(should_convert_module(path, skipped))
