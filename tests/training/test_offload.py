"""Offloaded inputs: the gradients of kept layers, the schedule as promised, on real tensors."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from qlora_trainer.base.layers import decoder_layers
from qlora_trainer.base.transfers import Transfers
from qlora_trainer.lora.fuse import fuse_mlps
from qlora_trainer.lora.inject import adapter_parameters, inject_adapter
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.tasks.loss_path import LossPath
from qlora_trainer.training.activations import plan_activations
from qlora_trainer.training.step import seed_random
from tests.training.tiny import CPU, adapted_llama, batch, tiny_llama


def gradients(model: Any, backwards: int = 1) -> dict[str, Tensor]:
    task = CausalLM(LossPath(True, ""))
    model.train()
    model.zero_grad()
    for index in range(backwards):
        seed_random(1, 2, index)
        task.loss_sum(model, task.prepare(batch(2, 10, seed=5 + index))).backward()
    return {n: p.grad.clone() for n, p in adapter_parameters(model).items() if p.grad is not None}


class Watched(Transfers):
    """Real copies, written down: which way, how many bytes, and what is alive when they begin."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.log: list[tuple[str, int]] = []
        self.sources: list[Any] = []
        self.most_on_device = 0
        self._back: list[Any] = []

    def to_host(self, tensor: Tensor) -> Any:
        self.log.append(("out", tensor.data_ptr()))
        self.sources.append(weakref.ref(tensor.untyped_storage()))
        return super().to_host(tensor)

    def to_device(self, *args: Any) -> Any:
        tensor, copy = super().to_device(*args)
        self.log.append(("back", tensor.numel() * tensor.element_size()))
        self._back = [ref for ref in self._back if ref() is not None]
        self._back.append(weakref.ref(tensor.untyped_storage()))
        self.most_on_device = max(self.most_on_device, len(self._back))
        return tensor, copy


def gpt2(dropout: float) -> Any:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=211, n_embd=16, n_layer=4, n_head=2, n_positions=32)
    )
    spec = AdapterSpec(rank=2, alpha=4, dropout=dropout)
    inject_adapter(model, spec, dtype=torch.float32, seed=0)
    return model


@pytest.mark.parametrize("build", [lambda d: adapted_llama(layers=4, dropout=d), gpt2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("plan", ["offload", ("keep", "offload", "recompute", "offload")])
def test_offloading_changes_no_bit_of_any_gradient(build: Any, dropout: float, plan: Any) -> None:
    model = build(dropout)
    kept = gradients(model, backwards=2)
    plan_activations(model, decoder_layers(model), plan)
    offloaded = gradients(model, backwards=2)
    assert kept.keys() == offloaded.keys()
    assert len(kept) > 0
    assert all(torch.equal(kept[name], offloaded[name]) for name in kept)


def test_inputs_leave_and_come_back_once_with_two_buffers_at_most() -> None:
    model = adapted_llama(layers=6)
    watched = Watched()
    plan = plan_activations(model, decoder_layers(model), "offload", transfers=watched)
    gradients(model)
    assert list(plan.layers.values()) == ["offload"] * 5 + ["recompute"]
    assert plan.offloaded == 5
    assert plan.recomputed == 6
    assert [way for way, _ in watched.log] == ["out"] * 5 + ["back"] * 5
    assert {size for way, size in watched.log if way == "back"} == {2 * 10 * 32 * 4}
    assert watched.most_on_device == 2


def test_the_device_copy_of_an_input_is_gone_when_the_next_layer_runs() -> None:
    model = adapted_llama(layers=5)
    watched = Watched()
    layers = decoder_layers(model)
    plan_activations(model, layers, "offload", transfers=watched)
    alive: list[int] = []

    def count(*_: Any) -> None:
        alive.append(sum(ref() is not None for ref in watched.sources))

    for _, layer in layers:
        layer.mlp.register_forward_pre_hook(count)
    gradients(model)
    # its own input (the last layer's is not offloaded), and the first one, which the model's own
    # forward holds by name to its end
    assert alive[:5] == [1, 2, 2, 2, 1]


def test_nothing_moves_below_the_lowest_adapter_or_in_evaluation() -> None:
    model = tiny_llama(layers=4)
    inject_adapter(model, AdapterSpec(rank=2, alpha=4, layers=(2, 3)), dtype=torch.float32, seed=0)
    watched = Watched()
    plan = plan_activations(model, decoder_layers(model), "offload", transfers=watched)
    assert list(plan.layers.values()) == ["keep", "keep", "offload", "recompute"]
    gradients(model)
    # layer 2's input wants no gradient, but recomputing it needs it all the same
    assert [way for way, _ in watched.log] == ["out", "back"]
    watched.log.clear()
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.ones(1, 4, dtype=torch.int64), use_cache=False)
    assert watched.log == []


def test_a_step_broken_off_leaves_nothing_behind() -> None:
    model = adapted_llama(layers=4)
    expected = gradients(model)
    plan_activations(model, decoder_layers(model), "offload")
    task = CausalLM(LossPath(True, ""))
    task.loss_sum(model, task.prepare(batch(1, 6, seed=1)))  # its graph is dropped
    found = gradients(model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_offload_and_the_fused_mlp_go_together() -> None:
    model = adapted_llama(layers=4, dropout=0.2)
    expected = gradients(model)
    fuse_mlps(model)
    plan_activations(model, decoder_layers(model), "offload")
    found = gradients(model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
