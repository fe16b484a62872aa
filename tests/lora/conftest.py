"""Tiny random models of real architectures, equal for equal seeds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

VOCAB = 50


def _llama(**more: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": False, **more}))


def _gpt2() -> nn.Module:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=VOCAB, n_positions=32)
    return GPT2LMHeadModel(config)


def _bert() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return BertForSequenceClassification(
        BertConfig(**sizes, num_attention_heads=2, vocab_size=VOCAB, num_labels=3)
    )


def _resnet() -> nn.Module:
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return ResNetForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "llama tied": lambda: _llama(tie_word_embeddings=True),
    "gpt2": _gpt2,
    "bert": _bert,
    "resnet": _resnet,
}


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    """Make a tiny model by name; the same weights for the same seed, whatever was drawn before."""

    def make(name: str, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return MODELS[name]().eval()

    return make


@pytest.fixture
def logits() -> Callable[[nn.Module], torch.Tensor]:
    """Logits of any of the tiny models for one fixed batch."""

    def run(model: nn.Module) -> torch.Tensor:
        generator = torch.Generator().manual_seed(9)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        if isinstance(inner, ResNetForImageClassification):
            inputs = {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
        else:
            inputs = {"input_ids": torch.randint(VOCAB, (2, 7), generator=generator)}
        with torch.no_grad():
            return model(**inputs).logits

    return run


@pytest.fixture
def stir() -> Callable[[nn.Module], None]:
    """Give every trainable parameter values that matter."""

    def draw(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)

    return draw
