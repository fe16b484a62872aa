from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_trainer.base.layers import decoder_layers
from qlora_trainer.lora.inject import adapter_parameters, inject_adapter
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.tasks.loss_path import LossPath
from qlora_trainer.training.activations import plan_activations
from qlora_trainer.training.step import seed_random
from tests.training.tiny import adapted_llama, batch, tiny_llama


def gradients(model: Any) -> dict[str, torch.Tensor]:
    task = CausalLM(LossPath(True, ""))
    model.train()
    model.zero_grad()
    seed_random(1, 2, 3)
    task.loss_sum(model, task.prepare(batch(2, 10, seed=5))).backward()
    return {n: p.grad.clone() for n, p in adapter_parameters(model).items() if p.grad is not None}


def gpt2(dropout: float) -> Any:
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=211, n_embd=16, n_layer=3, n_head=2, n_positions=32,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    model = tf.GPT2LMHeadModel(config)
    inject_adapter(
        model, AdapterSpec(rank=2, alpha=4, dropout=dropout), dtype=torch.float32, seed=0
    )
    return model


@pytest.mark.parametrize("build", [lambda d: adapted_llama(layers=3, dropout=d), gpt2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("plan", ["recompute", ("keep", "recompute", "recompute")])
def test_recomputation_changes_no_bit_of_any_gradient(
    build: Any, dropout: float, plan: Any
) -> None:
    model = build(dropout)
    kept = gradients(model)
    plan_activations(model, decoder_layers(model), plan)
    again = gradients(model)
    assert kept.keys() == again.keys()
    assert len(kept) > 0
    assert all(torch.equal(kept[name], again[name]) for name in kept)


class Calls:
    def __init__(self, layers: list[tuple[str, nn.Module]]) -> None:
        self.count = dict.fromkeys((name for name, _ in layers), 0)
        for name, layer in layers:
            inner = next(m for m in layer.modules() if isinstance(m, nn.Dropout | LlamaRMSNorm))
            inner.register_forward_pre_hook(lambda *_, name=name: self.add(name))

    def add(self, name: str) -> None:
        self.count[name] += 1


def test_only_planned_layers_run_twice_and_none_below_the_lowest_adapter() -> None:
    model = tiny_llama(layers=4)
    inject_adapter(
        model, AdapterSpec(rank=2, alpha=4, layers=(1, 2, 3)), dtype=torch.float32, seed=0
    )
    layers = decoder_layers(model)
    plan = plan_activations(model, layers, ["recompute", "recompute", "keep", "recompute"])
    calls = Calls(layers)
    gradients(model)
    assert list(plan.layers.values()) == ["keep", "recompute", "keep", "recompute"]
    assert plan.recomputed == 2
    assert list(calls.count.values()) == [1, 2, 1, 2]


def test_trained_embeddings_make_every_layer_matter() -> None:
    model = tiny_llama(layers=2)
    inject_adapter(
        model,
        AdapterSpec(rank=2, alpha=4, layers=(1,), modules_to_save=("embed_tokens",)),
        dtype=torch.float32,
        seed=0,
    )
    assert plan_activations(model, decoder_layers(model), "recompute").recomputed == 2


def test_a_plan_can_be_taken_back() -> None:
    model = adapted_llama(layers=2)
    layers = decoder_layers(model)
    plan_activations(model, layers, "recompute")
    plan_activations(model, layers, "keep")
    calls = Calls(layers)
    gradients(model)
    assert list(calls.count.values()) == [1, 1]


def test_generation_mode_computes_nothing_twice_and_warns_of_nothing() -> None:
    model = adapted_llama(layers=2)
    layers = decoder_layers(model)
    plan_activations(model, layers, "recompute")
    calls = Calls(layers)
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.ones(1, 4, dtype=torch.int64), use_cache=True)
    assert list(calls.count.values()) == [1, 1]


class Block(nn.Module):
    """A layer that knows nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(torch.tanh(self.linear(x)))


def test_a_foreign_layer_is_wrapped_on_its_instance_and_unwrapped_again() -> None:
    model = nn.Sequential(Block(), Block())
    layers = [(name, layer) for name, layer in model.named_children()]
    x = torch.randn(3, 4)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        model(x).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    kept = run()
    for _ in range(2):  # planning twice must not wrap twice
        plan_activations(model, layers, "recompute")
    calls = Calls(layers)
    assert all(torch.equal(a, b) for a, b in zip(kept, run(), strict=True))
    assert list(calls.count.values()) == [2, 2]
    plan_activations(model, layers, "keep")
    assert all(torch.equal(a, b) for a, b in zip(kept, run(), strict=True))
    assert list(calls.count.values()) == [3, 3]


def test_a_plan_of_another_length_is_refused() -> None:
    model = adapted_llama(layers=2)
    with pytest.raises(ValueError, match="3 choices for 2 layers"):
        plan_activations(model, decoder_layers(model), ["keep"] * 3)


def test_a_convolutional_network_without_layers_to_recompute_trains_as_it_is():
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    model = tf.ResNetForImageClassification(config)
    assert plan_activations(model, decoder_layers(model), "recompute").layers == {}
