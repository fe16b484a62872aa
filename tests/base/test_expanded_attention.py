import copy

import pytest
import torch
from transformers import StableLmConfig, StableLmForCausalLM

from qlora_trainer.base.expanded_attention import NAME, expands_keys, use_expanded_attention
from tests.base.conftest import grouped_llama


@pytest.fixture(scope="module")
def model():
    return grouped_llama()


@pytest.mark.parametrize("padded", [False, True])
def test_expanded_keys_change_neither_outputs_nor_gradients(model, padded):
    tokens = torch.arange(24).view(2, 12) % 97
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, 9:] = 0
    found = []
    for capability in ((8, 0), (7, 5)):
        tried = copy.deepcopy(model)
        expanded = use_expanded_attention(tried, capability, torch.bfloat16)
        assert expanded == (capability == (7, 5))
        logits = tried(input_ids=tokens, attention_mask=mask).logits[mask.bool()]
        logits.square().mean().backward()
        found.append((logits, tried.model.layers[0].self_attn.k_proj.weight.grad))
    for plain, expanded in zip(*found, strict=True):
        torch.testing.assert_close(expanded, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("capability", "dtype", "expands"),
    [
        ((7, 5), torch.float16, True),
        ((8, 6), torch.bfloat16, False),
        ((8, 6), torch.float16, False),
        ((8, 6), torch.float32, True),  # flash attention computes in 16 bit only
        ((12, 0), torch.float32, True),
    ],
)
def test_keys_are_expanded_where_no_fused_kernel_takes_groups(capability, dtype, expands):
    assert expands_keys(capability, dtype) == expands


def test_attention_chosen_by_the_user_stays(model):
    chosen = copy.deepcopy(model)
    chosen.set_attn_implementation("eager")
    assert not use_expanded_attention(chosen, (7, 5), torch.float16)
    assert chosen.config._attn_implementation != NAME


def test_a_class_that_only_asks_the_registry_is_expanded_as_well():
    torch.manual_seed(0)
    config = StableLmConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    model = StableLmForCausalLM(config).eval()
    assert not getattr(model, "_supports_attention_backend", False)
    tokens = torch.arange(12)[None] % 97
    expected = model(input_ids=tokens).logits
    assert use_expanded_attention(model, (7, 5), torch.float16)
    assert model.config._attn_implementation == NAME
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-6)
