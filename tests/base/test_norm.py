"""The tiled RMSNorm is the module it replaces: the forward's bits, the gradient's formula."""

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from qlora_trainer.base.norm import TiledRMSNorm, tile_norms
from qlora_trainer.memory.log import ALLOCATE, FREE
from qlora_trainer.memory.tracker import AllocationTracker

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 50,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, 3),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig, 3),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config, 3),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config, 5),
    "phi3": (tf.Phi3ForCausalLM, tf.Phi3Config, 3),
    "smollm3": (tf.SmolLM3ForCausalLM, tf.SmolLM3Config, 3),
    "gemma": (tf.GemmaForCausalLM, tf.GemmaConfig, 3),
    "gemma2": (tf.Gemma2ForCausalLM, tf.Gemma2Config, 5),
    "gemma3": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, 7),
}


def family(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model_class, config_class, _ = FAMILIES[name]
    model = model_class(config_class(**SIZES)).to(dtype).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.5)
    return model


def norms(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_known_norm_keeps_its_bits_and_its_gradient(name: str, dtype: torch.dtype) -> None:
    model = family(name, dtype)
    before = norms(model)
    replaced, kept = tile_norms(model, 5 * 32)  # several tiles, the last one shorter
    assert not kept
    assert len(replaced) == len(before) == FAMILIES[name][2]
    for path, theirs in before.items():
        ours = model.get_submodule(path)
        assert isinstance(ours, TiledRMSNorm)
        x = torch.randn(3, 7, theirs.weight.shape[0]).mul_(3).to(dtype)
        weights = torch.randn(x.shape).to(dtype)
        grads = []
        for module in (theirs, ours):
            given = x.clone().requires_grad_()
            y = module(given)
            outside = weights.clone()
            grads.append([y, *torch.autograd.grad(y, given, outside)])
            assert torch.equal(given, x)
            assert torch.equal(outside, weights)  # buffers written over are the norm's own
        assert torch.equal(grads[0][0], grads[1][0])
        expected = grads[0][1].float()
        allowed = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 1e-6)
        assert (grads[1][1].float() - expected).norm() <= allowed * expected.norm()


@pytest.mark.parametrize("style", ["llama", "gemma"])
def test_gradients_are_the_derivatives_in_float64(style: Any) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, dtype=torch.float64), requires_grad=False)
    module = TiledRMSNorm(weight, 1e-6, style)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))


def test_only_the_input_is_kept_and_nothing_in_fp32() -> None:
    module = TiledRMSNorm(nn.Parameter(torch.ones(16).bfloat16(), False), 1e-6, "llama")
    x = torch.randn(4, 16).bfloat16().requires_grad_()
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), module.weight.data_ptr()}


@pytest.mark.parametrize("tokens", [40, 8])
@pytest.mark.parametrize("style", ["llama", "gemma"])
def test_fp32_is_of_one_tile_forward_and_of_two_backward(style: Any, tokens: int) -> None:
    weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16, device="meta"), False)
    module = TiledRMSNorm(weight, 1e-6, style, tokens * 64)
    x = torch.empty(40, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    forward, backward = AllocationTracker("meta"), AllocationTracker("meta")
    with forward:
        y = module(x)
    g = torch.empty_like(y)
    with backward:
        torch.autograd.grad(y, x, g)
    for tracker, count in ((forward, 1), (backward, 2)):
        sizes = [allocation.size_bytes for allocation in tracker.log.allocations]
        assert max(sizes) == max(tokens * 64 * 4, 40 * 64 * 2)  # a tile in fp32, the whole in bf16
        assert most_at_once(tracker, tokens * 64 * 4) == count


def most_at_once(tracker: AllocationTracker, size_bytes: int) -> int:
    """How many storages of that size there are at one moment."""
    alive = most = 0
    for kind, index in tracker.log.events:
        if tracker.log.allocations[index].size_bytes == size_bytes:
            alive += {ALLOCATE: 1, FREE: -1}.get(kind, 0)
            most = max(most, alive)
    return most


def test_trained_and_unknown_norms_stay_and_are_named() -> None:
    model = family("llama", torch.float32)
    model.model.norm.weight.requires_grad_(True)
    model.model.layers[0].input_layernorm = nn.RMSNorm(32)
    replaced, kept = tile_norms(model)
    assert replaced == ["model.layers.0.post_attention_layernorm"]
    assert kept == {
        "model.norm": "it is itself trained",
        "model.layers.0.input_layernorm": "RMSNorm is no norm we know",
    }
