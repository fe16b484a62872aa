"""On a real model: merged onto dequantized weights, the export is base + adapter."""

import warnings

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_trainer.base.load import BaseSpec, load_base
from qlora_trainer.export.builtin import builtin_rows
from qlora_trainer.export.merged import prepare, write_candidate
from qlora_trainer.export.plain import compared_logits
from qlora_trainer.lora.files import load_adapter
from tests.export.test_merged import relative

CPU = torch.device("cpu")


@pytest.mark.slow
def test_smollm2_merged_onto_dequantized_weights_is_base_and_adapter(smollm2, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers in a way that is to go
        adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    adapted.save_pretrained(tmp_path / "adapter")
    del model, adapted
    spec = BaseSpec("nf4", compute_dtype=torch.float32)
    trained = load_base(smollm2, AutoModelForCausalLM, spec, CPU)
    load_adapter(trained, tmp_path / "adapter", dtype=torch.float32, trainable=False)
    built_in = builtin_rows(smollm2, trained, causal=True, trust_remote_code=False)
    assert built_in is not None
    rows = [{name: value[:64] for name, value in row.items()} for row in built_in.rows[:3]]
    expected = torch.cat([compared_logits(trained, row, shift=True, device=CPU)[0] for row in rows])
    del trained
    for dtype, most in (("fp32", 1e-5), ("fp16", 1e-3)):
        prepared = prepare(smollm2, tmp_path / "adapter", AutoModelForCausalLM, spec, dtype=dtype)
        out = tmp_path / dtype
        out.mkdir()
        write_candidate(prepared, out, "dequantized", max_shard_bytes=10**9)
        merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        found = [compared_logits(merged, row, shift=True, device=CPU)[0] for row in rows]
        assert relative(torch.cat(found), expected) < most
