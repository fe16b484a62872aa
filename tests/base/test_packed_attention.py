"""Packed rows without a mask: the loss and gradients of the examples one by one."""

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_trainer.base.packed_attention import (
    example_lengths,
    is_example_lengths,
    takes_example_lengths,
    use_packed_attention,
    why_masked,
)

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES)),
    "mistral, short window": lambda: tf.MistralForCausalLM(
        tf.MistralConfig(**SIZES, sliding_window=3)
    ),
    "gemma3, short window": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**SIZES, sliding_window=3)
    ),
}
LENGTHS = [5, 1, 9, 2]


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]()
    model.set_attn_implementation("sdpa")
    return model.train()


def examples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, 50, (1, n), generator=generator) for n in LENGTHS]


def outcome(model: Any, logits: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits.log_softmax(-1)[..., 7].sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {**gradients, "logits": logits.detach()}


def packed_inputs() -> dict[str, Tensor]:
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return {"input_ids": torch.cat(examples(), dim=1), "position_ids": positions}


@pytest.mark.parametrize("name", MODELS)
def test_packed_examples_give_the_logits_and_gradients_of_each_alone(name: str) -> None:
    model = build(name)
    alone = [model(input_ids=ids, use_cache=False).logits for ids in examples()]
    expected = outcome(model, torch.cat(alone, dim=1))
    inputs = packed_inputs()
    masked = outcome(model, model(**inputs, use_cache=False).logits)  # transformers' own way
    assert use_packed_attention(model)
    lengths = example_lengths(inputs["position_ids"])
    found = outcome(model, model(**inputs, attention_mask=lengths, use_cache=False).logits)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[key], masked[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral, short window"])
def test_batches_that_are_not_packed_pass_through(name: str) -> None:
    model = build(name)
    ids = torch.randint(3, 50, (2, 8))
    padded = torch.ones(2, 8, dtype=torch.int64)
    padded[1, 5:] = 0
    for mask in (None, padded):
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        use_packed_attention(model)
        found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert torch.equal(found, expected)
        model.set_attn_implementation("sdpa")


class Largest(TorchDispatchMode):
    """The largest result of any operator."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_nothing_of_the_row_is_squared() -> None:
    model = build("llama").model.requires_grad_(False)
    tokens = 2048
    positions = torch.arange(64).repeat(tokens // 64)[None]
    inputs = {"input_ids": torch.ones(1, tokens, dtype=torch.int64), "position_ids": positions}
    squared = tokens * tokens
    with Largest() as masked:
        model(**inputs, use_cache=False)
    assert masked.elements >= squared
    use_packed_attention(model)
    with Largest() as packed:
        model(**inputs, attention_mask=example_lengths(positions), use_cache=False)
    assert packed.elements <= tokens * SIZES["intermediate_size"]


WINDOW_IN_MASK: dict[str, Any] = {
    "phimoe": lambda window: tf.PhimoeForCausalLM(
        tf.PhimoeConfig(**SIZES, num_local_experts=2, sliding_window=window)
    ),
    "doge": lambda window: tf.DogeForCausalLM(tf.DogeConfig(**SIZES, sliding_window=window)),
    "llama4": lambda window: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **SIZES, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=window
        )
    ),
}


@pytest.mark.parametrize("name", WINDOW_IN_MASK)
def test_windows_that_only_the_mask_knows_keep_the_mask(name: str) -> None:
    torch.manual_seed(0)
    model = WINDOW_IN_MASK[name](4).eval()
    model.set_attn_implementation("sdpa")
    inputs = {"input_ids": torch.arange(3, 15)[None], "position_ids": torch.arange(12)[None]}
    windowed = model(**inputs, use_cache=False).logits
    assert not use_packed_attention(model, 12)
    assert "mask" in str(why_masked(model, 12))
    assert not takes_example_lengths(model)
    assert torch.equal(model(**inputs, use_cache=False).logits, windowed)
    # What the wrapped attention would lose: the last token does not see the first.
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, 0] = 40
    assert torch.equal(model(**changed, use_cache=False).logits[:, -1:], windowed[:, -1:])


@pytest.mark.parametrize("name", ["phimoe", "doge"])
def test_windows_no_example_reaches_take_no_mask(name: str) -> None:
    model = WINDOW_IN_MASK[name](9).eval()
    model.set_attn_implementation("sdpa")
    assert use_packed_attention(model, 9)
    assert not why_masked(model, 9)


def test_other_attentions_are_left_alone() -> None:
    model = build("llama")
    model.set_attn_implementation("eager")
    assert not use_packed_attention(model)
    assert model.config._attn_implementation == "eager"
    assert not takes_example_lengths(model)


def test_no_mask_looks_like_lengths() -> None:
    assert is_example_lengths(example_lengths(torch.tensor([[0, 1, 0]])))
    assert not is_example_lengths(torch.ones(1, 4, dtype=torch.int64))
    assert not is_example_lengths(torch.ones(1, 1, 4, 4, dtype=torch.bool))
    assert not is_example_lengths(torch.ones(1, 1, 1, 4))
