"""Fused q, k and v train as the attention they take the place of, in every layout we know."""

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from qlora_trainer.base.tiled_attention import use_tiled_attention
from qlora_trainer.lora.fuse_qkv import LAYOUTS, fuse_qkv
from qlora_trainer.lora.inject import (
    adapter_parameters,
    adapters_disabled,
    inject_adapter,
)
from qlora_trainer.lora.spec import AdapterSpec
from tests.lora.test_gated_mlp import (
    FAMILIES,
    SIZES,
    assert_names_stay_and_adapters_are_reached,
    family,
    quantized,
    run,
)

WINDOW = {**SIZES, "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}
KNOWN: dict[str, Any] = {
    "llama": FAMILIES["llama"],
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**{**SIZES, "sliding_window": 4})),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**WINDOW)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**WINDOW)),
    "biased": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, attention_bias=True)),
}


def adapted(name: str, **spec: Any) -> Any:
    torch.manual_seed(0)
    model = KNOWN[name]()
    inject_adapter(model, AdapterSpec(**{"rank": 4, "alpha": 8} | spec), dtype=torch.float32)
    for index, parameter in enumerate(adapter_parameters(model).values()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(index))
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", KNOWN)
def test_every_known_architecture_trains_as_before(name: str, attention: str) -> None:
    model = adapted(name)
    model.set_attn_implementation(attention)
    plain = run(model)
    found = fuse_qkv(model)
    assert len(found.modules) == 2
    assert not found.kept
    fused = run(model)
    assert plain.keys() == fused.keys()
    for key, expected in plain.items():
        torch.testing.assert_close(fused[key], expected, rtol=1e-4, atol=1e-5, msg=key)


def test_every_layout_is_held_against_its_class() -> None:
    classes = {
        type(module).__name__
        for build in KNOWN.values()
        for module in build().modules()
        if type(module).__name__.endswith("Attention")
    }
    assert classes == set(LAYOUTS)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("o_proj",), ("k_proj", "down_proj")])
def test_projections_without_adapters_stay_as_they_are(targets: tuple[str, ...]) -> None:
    model = adapted("llama", target_modules=targets)
    plain = run(model)
    assert len(fuse_qkv(model).modules) == 2
    for key, found in run(model).items():
        torch.testing.assert_close(found, plain[key], rtol=1e-4, atol=1e-5, msg=key)


def test_dropout_draws_the_masks_of_the_separate_projections() -> None:
    model = adapted("llama", dropout=0.3)
    plain = run(model)
    fuse_qkv(model)
    for key, found in run(model).items():
        torch.testing.assert_close(found, plain[key], rtol=1e-4, atol=1e-5, msg=key)


def test_on_nf4_in_bf16_with_tiled_attention_it_is_rounding_that_differs() -> None:
    model = quantized(family("llama", dtype=torch.bfloat16), torch.bfloat16)
    assert use_tiled_attention(model)
    plain = run(model)
    fuse_qkv(model)
    for key, found in run(model).items():
        assert (found - plain[key]).norm() <= 0.03 * plain[key].norm(), key


def test_evaluation_and_generation_run_the_modules_own_forward() -> None:
    model = adapted("llama").eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with adapters_disabled(model):
            base = model(input_ids=ids).logits
        words = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        fuse_qkv(model)
        assert torch.equal(model(input_ids=ids).logits, plain)
        with adapters_disabled(model):
            assert torch.equal(model(input_ids=ids).logits, base)
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), words)


def test_parameters_keep_their_names_and_the_adapters_are_reached() -> None:
    assert_names_stay_and_adapters_are_reached(fuse_qkv)


def test_a_copied_model_runs_on_its_own_modules() -> None:
    model = adapted("llama")
    fuse_qkv(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in adapter_parameters(other).values():
            parameter.zero_()
    expected = run(model)["logits"]
    assert not torch.allclose(run(other)["logits"], expected)
    assert torch.equal(run(model)["logits"], expected)


def test_what_is_not_known_keeps_its_own_forward_and_is_named() -> None:
    torch.manual_seed(0)
    gemma = FAMILIES["gemma2"]()
    found = fuse_qkv(gemma)
    assert not found.modules
    assert set(found.kept.values()) == {"Gemma2Attention is no layout we know"}
    trained = FAMILIES["llama"]()
    spec = AdapterSpec(rank=2, alpha=4, target_modules=("q_proj",), modules_to_save=("v_proj",))
    inject_adapter(trained, spec, dtype=torch.float32)
    assert set(fuse_qkv(trained).kept.values()) == {"v_proj is itself trained"}
