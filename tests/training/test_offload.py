"""Offloaded inputs: the gradients of kept layers, the schedule as promised, on real tensors."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from qlora_trainer.base.layers import decoder_layers
from qlora_trainer.base.transfers import Copy, Transfers
from qlora_trainer.lora.fuse import fuse_mlps
from qlora_trainer.lora.inject import adapter_parameters, inject_adapter
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.tasks.loss_path import LossPath
from qlora_trainer.training.activations import plan_activations
from qlora_trainer.training.offload import Offload
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
        self.shapes: dict[str, Counter[tuple[int, ...]]] = {"out": Counter(), "back": Counter()}
        self.sources: list[Any] = []
        self.most_on_device = 0
        self._back: list[Any] = []

    def to_host(self, tensor: Tensor) -> Any:
        self.log.append(("out", tensor.data_ptr()))
        self.shapes["out"][tuple(tensor.shape)] += 1
        self.sources.append(weakref.ref(tensor.untyped_storage()))
        return super().to_host(tensor)

    def to_device(self, *args: Any) -> Any:
        tensor, copy = super().to_device(*args)
        self.log.append(("back", tensor.numel() * tensor.element_size()))
        self.shapes["back"][tuple(tensor.shape)] += 1
        self._back.append(weakref.ref(tensor.untyped_storage()))
        self.most_on_device = max(self.most_on_device, self.on_device())
        return tensor, copy

    def on_device(self) -> int:
        """How many that came back are there still."""
        return sum(ref() is not None for ref in self._back)


class AtWait(Copy):
    """A copy that moves its bytes as late as may be: when it is waited for, or never."""

    def __init__(self, source: Any, move: Callable[[], None]) -> None:
        super().__init__(source, None, CPU)
        self._move: Callable[[], None] | None = move

    def wait(self) -> None:
        if self._move is not None:
            self._move()
        self._move = None
        super().wait()


class Late(Transfers):
    """Copies that are under way until somebody waits for them."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self._begun: list[Callable[[], None]] = []

    def move(self, pieces: list[Tensor], flat: Tensor, *, back: bool) -> None:
        move = super().move
        self._begun.append(lambda: move(pieces, flat, back=back))

    def to_host(self, tensor: Tensor) -> tuple[list[Tensor], Copy]:
        pieces, copy = super().to_host(tensor)
        return pieces, AtWait(copy, self._begun.pop())

    def to_device(self, *args: Any) -> tuple[Tensor, Copy]:
        tensor, copy = super().to_device(*args)
        return tensor, AtWait(copy, self._begun.pop())


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


def test_every_copy_is_waited_for_before_its_bytes_are_used() -> None:
    model = adapted_llama(layers=5, dropout=0.2)
    kept = gradients(model, backwards=2)
    plan_activations(model, decoder_layers(model), "offload", transfers=Late())
    offloaded = gradients(model, backwards=2)
    assert all(torch.equal(kept[name], offloaded[name]) for name in kept)


def test_a_block_lives_until_the_next_layer_has_waited_for_its_copy() -> None:
    run = Offload(Transfers(CPU)).layer(to_host=True)
    x = torch.randn(3, 5, requires_grad=True)
    states = 2 * x
    block = weakref.ref(states.untyped_storage())
    first = run(torch.tanh, states)
    del states
    assert block() is not None  # its copy may be under way
    second = run(torch.sin, first)
    assert block() is None
    second.sum().backward()
    slope = torch.cos(torch.tanh(2 * x)) * (1 - torch.tanh(2 * x) ** 2) * 2
    torch.testing.assert_close(x.grad, slope)


def t5() -> Any:
    """Its layers take hidden states, those of the encoder and position biases by position."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=101, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=3,
            num_heads=4, decoder_start_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    inject_adapter(model, AdapterSpec(rank=2, alpha=4, dropout=0.1), dtype=torch.float32, seed=0)
    return model.train()


def t5_gradients(model: Any, *, backwards: int = 1) -> dict[str, Tensor]:
    """Of one loss, differentiated so often."""
    model.zero_grad()
    seed_random(1, 2, 3)
    ids, labels = torch.arange(1, 21).view(2, 10), torch.arange(1, 15).view(2, 7)
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    for left in reversed(range(backwards)):
        loss.backward(retain_graph=left > 0)
    return {n: p.grad.clone() for n, p in adapter_parameters(model).items() if p.grad is not None}


@pytest.mark.parametrize("make", [Watched, Late])
def test_layers_of_several_inputs_have_the_gradients_of_kept_ones(make: Any) -> None:
    model = t5()
    kept = t5_gradients(model)
    plan_activations(model, decoder_layers(model), "offload", transfers=make())
    offloaded = t5_gradients(model)
    assert kept.keys() == offloaded.keys()
    assert all(torch.equal(kept[name], offloaded[name]) for name in kept)


def test_what_layers_share_leaves_once_and_all_that_leaves_comes_back_once() -> None:
    model, watched = t5(), Watched()
    plan_activations(model, decoder_layers(model), "offload", transfers=watched)
    t5_gradients(model)
    assert watched.shapes["out"] == {
        (2, 10, 32): 3 + 1,  # into each layer of the encoder, and out of it
        (2, 7, 32): 2,  # into the decoder's layers but the last
        (1, 4, 7, 10): 1,  # the bias of its cross-attention
    }
    assert watched.shapes["back"] == watched.shapes["out"]
    ways = [way for way, _ in watched.log]
    assert ways == sorted(ways, reverse=True)


def test_a_graph_may_be_gone_through_twice() -> None:
    model = t5()
    kept = t5_gradients(model, backwards=2)
    plan_activations(model, decoder_layers(model), "offload")
    offloaded = t5_gradients(model, backwards=2)
    assert all(torch.equal(kept[name], offloaded[name]) for name in kept)


def test_nothing_stays_on_the_device_once_the_last_layer_has_had_it() -> None:
    watched = Watched()
    offload = Offload(watched)
    run, last = offload.layer(to_host=True), offload.layer(to_host=False)
    x, factor = torch.randn(3, requires_grad=True), torch.randn(3)
    y = last(torch.mul, run(torch.mul, 2 * x, factor), factor)
    y.sum().backward(retain_graph=True)  # the graph, and what it has stored, is still there
    assert watched.shapes["back"] == {(3,): 2}
    assert watched.on_device() == 0


def test_a_shared_input_that_changes_in_place_is_stored_again() -> None:
    run = Offload(Transfers(CPU)).layer(to_host=True)
    x, factor = torch.randn(3, requires_grad=True), torch.full((3,), 2.0)
    y = run(torch.mul, x, factor)
    factor.add_(3.0)
    run(torch.mul, y, factor).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [10.0] * 3
