"""A model that lets packed examples see each other is found out by asking it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, MambaConfig

from qlora_trainer.base.packed_attention import use_packed_attention
from qlora_trainer.data.isolation import packing_leak, refuse_packing_leak
from qlora_trainer.errors import UserError

CPU = torch.device("cpu")
LLAMA = LlamaConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)
BLOOM = BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2)
MAMBA = MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_llama_keeps_packed_examples_apart(attention):
    model = AutoModelForCausalLM.from_config(LLAMA, attn_implementation=attention).train()
    assert packing_leak(model, CPU, 50) < 1e-6
    refuse_packing_leak(model, CPU, 50)
    assert model.training


def test_a_llama_keeps_them_apart_without_a_mask() -> None:
    model = AutoModelForCausalLM.from_config(LLAMA, attn_implementation="sdpa")
    masked = packing_leak(model, CPU, 50)
    assert use_packed_attention(model)
    assert packing_leak(model, CPU, 50) == pytest.approx(masked, abs=1e-6)


@pytest.mark.parametrize("config", [BLOOM, MAMBA], ids=["alibi", "state-space"])
def test_models_without_boundaries_are_refused(config):
    torch.manual_seed(0)
    config.initializer_range = 0.5
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with pytest.raises(UserError, match=r"set data\.packing: false"):
        refuse_packing_leak(model, CPU, 50)
