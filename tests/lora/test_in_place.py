"""A model may add in place to what our functions give it, as to what a plain layer gives."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig

from qlora_trainer.base.load import BaseSpec, load_base
from qlora_trainer.lora.inject import adapter_parameters, inject_adapter
from qlora_trainer.lora.spec import AdapterSpec


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("targets", ["all-linear", ("query_key_value",)])
def test_falcon_adds_its_attention_to_its_mlp_in_place(
    tmp_path: Path, quantization: str, targets: str | tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bias=False
    )
    assert config.parallel_attn  # the kind that adds in place
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    spec = BaseSpec(quantization, compute_dtype=torch.float32)
    model = load_base(tmp_path, AutoModelForCausalLM, spec, torch.device("cpu"))
    spec_of_adapter = AdapterSpec(rank=4, alpha=8, target_modules=targets)
    inject_adapter(model, spec_of_adapter, dtype=torch.float32)
    model.train()
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    trained = adapter_parameters(model)
    assert trained
    assert all(p.grad is not None for p in trained.values())
