"""Claims of base/prequantized.py: transformers' own NF4 checkpoints are taken over bit by bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_trainer.base.audit import audit_base
from qlora_trainer.base.load import BaseSpec, build_weightless_base, load_base, load_config
from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.errors import UserError

CPU = torch.device("cpu")
NF4 = BaseSpec("nf4")
SaveTiny = Callable[..., Path]


def quantized_copy(folder: Path, **settings: Any) -> Path:
    """What a user would have made with transformers and bitsandbytes."""
    arguments = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    } | settings
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**arguments), dtype="auto", device_map="cpu"
    )
    target = folder.with_name(folder.name + "-bnb" + str(len(settings)))
    model.save_pretrained(target)
    return target


def layers(model: Any) -> dict[str, NF4Linear]:
    return {path: m for path, m in model.named_modules() if isinstance(m, NF4Linear)}


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_quantizing_the_original_bit_for_bit(
    save_tiny: SaveTiny, family: str, double_quant: bool, dtype: torch.dtype
) -> None:
    folder = save_tiny(family, AutoModelForCausalLM, dtype)
    theirs = quantized_copy(folder, bnb_4bit_use_double_quant=double_quant)
    spec = BaseSpec("nf4", double_quant=double_quant)
    ours, taken = (load_base(f, AutoModelForCausalLM, spec, CPU) for f in (folder, theirs))
    mine, original = layers(taken), layers(ours)
    assert mine.keys() == original.keys()
    for path, layer in mine.items():
        other = original[path]
        assert layer.double_quant == double_quant
        assert layer.fan_in_fan_out == other.fan_in_fan_out
        for name, tensor in other.named_buffers():
            assert torch.equal(getattr(layer, name), tensor), (path, name)
    ids = torch.arange(1, 20)[None]
    assert torch.equal(taken(input_ids=ids).logits, ours(input_ids=ids).logits)
    assert not hasattr(taken.config, "quantization_config")


@pytest.mark.parametrize(
    "settings", [{}, {"llm_int8_skip_modules": ["lm_head", "model.layers.*.mlp"]}]
)
def test_weightless_base_knows_which_layers_are_quantized(
    save_tiny: SaveTiny, settings: dict[str, Any]
) -> None:
    folder = quantized_copy(save_tiny("llama", AutoModelForCausalLM), **settings)
    real = load_base(folder, AutoModelForCausalLM, NF4, CPU)
    weightless = build_weightless_base(load_config(folder), AutoModelForCausalLM, NF4)
    assert layers(weightless).keys() == layers(real).keys()
    assert audit_base(weightless) == audit_base(real)
    assert any("mlp" in path for path in layers(real)) == (not settings)


def test_asking_for_16_bit_of_a_quantized_checkpoint_is_a_contradiction(
    save_tiny: SaveTiny,
) -> None:
    folder = quantized_copy(save_tiny("llama", AutoModelForCausalLM))
    with pytest.raises(UserError, match="quantized already"):
        load_base(folder, AutoModelForCausalLM, BaseSpec("none"), CPU)


def test_fp4_and_other_formats_are_refused_by_name(save_tiny: SaveTiny) -> None:
    plain = save_tiny("llama", AutoModelForCausalLM)
    with pytest.raises(UserError, match="bitsandbytes fp4"):
        load_base(quantized_copy(plain, bnb_4bit_quant_type="fp4"), AutoModelForCausalLM, NF4, CPU)
    config = json.loads((plain / "config.json").read_text())
    for settings, name in (
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit"),
    ):
        (plain / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
        with pytest.raises(UserError, match=rf"quantized already \({name}\)"):
            load_base(plain, AutoModelForCausalLM, NF4, CPU)
