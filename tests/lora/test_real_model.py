"""The real SmolLM2 in float32: our adapter and PEFT's are one and the same."""

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_trainer.lora.files import save_adapter
from qlora_trainer.lora.inject import adapters_disabled, inject_adapter
from qlora_trainer.lora.spec import AdapterSpec

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


@pytest.mark.slow
@torch.no_grad()
def test_peft_computes_what_we_compute_on_the_real_model(smollm2: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    ids = torch.arange(100, 132).view(2, 16)
    base = model(input_ids=ids).logits
    spec = AdapterSpec(rank=8, alpha=16)
    names = inject_adapter(model, spec, dtype=torch.float32)
    assert len(names) == 7 * 30
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.normal_(std=0.02)
    ours = model(input_ids=ids).logits
    assert (ours - base).abs().max() > 0.1
    with adapters_disabled(model):
        assert torch.equal(model(input_ids=ids).logits, base)
    save_adapter(model, spec, tmp_path / "a", base_source=str(smollm2), task_type="CAUSAL_LM")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    del model
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "a")).eval()
    difference = (theirs(input_ids=ids).logits - ours).abs().max()
    assert difference <= 1e-5 * ours.abs().max()
