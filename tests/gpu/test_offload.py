"""Offloaded inputs on a card: copies that lag far behind the computing spoil nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_trainer.base.layers import decoder_layers
from qlora_trainer.base.transfers import Transfers
from qlora_trainer.lora.inject import adapter_parameters, inject_adapter
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.training.activations import plan_activations
from qlora_trainer.training.offload import Offload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
CARD = torch.device("cuda")
LAYERS = 6


class Slow(Transfers):
    """Every copy begins some milliseconds after it was asked for, on the stream of the copies."""

    def move(self, pieces: list[Tensor], flat: Tensor, *, back: bool) -> None:
        if self.device.type == "cuda":
            torch.cuda._sleep(10_000_000)  # cycles
        super().move(pieces, flat, back=back)


def llama() -> Any:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    inject_adapter(model, AdapterSpec(rank=4, alpha=8), dtype=torch.bfloat16, seed=0)
    return model.to(CARD).train()


@pytest.mark.parametrize("make", [Transfers, Slow])
def test_offloading_has_the_gradients_of_recomputing_bit_for_bit(
    make: Callable[[torch.device], Transfers],
) -> None:
    model, found = llama(), []
    ids = torch.arange(256, device=CARD).view(2, 128)
    for plan in ("recompute", "offload"):
        plan_activations(model, decoder_layers(model), plan, transfers=make(CARD))
        for _ in range(2):  # the second finds the blocks of the first
            model.zero_grad()
            with sdpa_kernel(SDPBackend.MATH):  # adds in one order
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients = adapter_parameters(model).items()
        found.append({name: p.grad.clone() for name, p in gradients if p.grad is not None})
    recomputed, offloaded = found
    assert len(recomputed) > 0
    assert recomputed.keys() == offloaded.keys()
    assert all(torch.equal(recomputed[name], offloaded[name]) for name in recomputed)


def test_no_block_is_used_again_under_a_copy_that_lags_behind() -> None:
    factors = [nn.Parameter(torch.full((2**20,), 1.0 + n, device=CARD)) for n in range(LAYERS)]
    offload = Offload(Slow(CARD))
    x = torch.randn(2**20, device=CARD)
    y = x
    for factor in factors:  # each is over long before its input has left
        y = offload.layer(to_host=factor is not factors[-1])(torch.mul, y, factor)
    y.sum().backward()
    product = torch.stack([factor.detach() for factor in factors]).prod(0)
    for factor in factors:
        torch.testing.assert_close(factor.grad, x * product / factor.detach())
