"""The head in 8 or 4 bits: what tiles compute is what the dequantized whole would."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_trainer.base.audit import audit_base
from qlora_trainer.base.head import QuantizedHead
from qlora_trainer.base.load import BaseSpec, build_weightless_base, load_base
from qlora_trainer.errors import UserError
from tests.base.conftest import tiny_config

CPU = torch.device("cpu")
PLAIN = BaseSpec("none")
IDS = torch.arange(1, 21)[None]


def quantized(bits: int, *, bias: bool = True) -> QuantizedHead:
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 1300, bias=bias)
    return QuantizedHead.quantize(
        linear, bits=bits, block_size=64, dtype=torch.float32, tile_elements=520 * 96
    )


def dense(head: QuantizedHead) -> torch.Tensor:
    return head.held.rows(0, head.out_features, torch.float32)


@pytest.mark.parametrize("bits", [8, 4])
def test_tiles_are_the_rows_of_the_whole_weight(bits: int) -> None:
    head = quantized(bits)
    whole = dense(head)
    tiles = list(head.tiles())
    assert len(tiles) > 2
    assert torch.equal(torch.cat([tile for _, tile in tiles]), whole)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_and_its_gradient_are_those_of_the_whole_weight(bits: int, bias: bool) -> None:
    head = quantized(bits, bias=bias)
    whole = dense(head)
    x = torch.randn(2, 5, 96, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    expected = torch.nn.functional.linear(x, whole, head.bias)
    found = head(y)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-5, atol=1e-4)


def test_int8_rounds_each_row_by_its_own_largest_weight() -> None:
    weight = torch.tensor([[1.0, -0.5, 0.0], [100.0, 1.0, -100.0], [0.0, 0.0, 0.0]])
    linear = torch.nn.Linear(3, 3, bias=False)
    linear.weight.data = weight
    head = QuantizedHead.quantize(linear, bits=8, block_size=64, dtype=torch.float32)
    assert linear.weight[0, 0] == 1.0  # the source is left as it is
    largest = weight.abs().amax(1, keepdim=True)
    assert ((dense(head) - weight).abs() <= largest / 254 + 1e-6).all()
    assert torch.equal(dense(head)[2], weight[2])


def test_16_bit_computing_leaves_the_scales_in_fp32() -> None:
    head = quantized(8)
    scale = head.held.scale.clone()
    head.to(torch.bfloat16)
    assert head.dtype == torch.bfloat16
    assert head(torch.randn(2, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert torch.equal(head.held.scale, scale)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.02), (4, 0.2)])
def test_a_loaded_model_has_nearly_its_own_logits(
    save_tiny: Callable[..., Path], bits: int, bound: float
) -> None:
    folder = save_tiny("llama", AutoModelForCausalLM)
    plain = load_base(folder, AutoModelForCausalLM, PLAIN, CPU)
    small = load_base(folder, AutoModelForCausalLM, replace(PLAIN, head_bits=bits), CPU)
    expected, found = plain(input_ids=IDS).logits, small(input_ids=IDS).logits
    assert 0 < float((found - expected).norm() / expected.norm()) < bound
    roles = {item.name: item.role for item in audit_base(small).tensors}
    assert {role for name, role in roles.items() if name.endswith(".codes")} == {"head"}
    tokens = small.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, 23)


def test_the_weightless_head_takes_the_same_bytes(save_tiny: Callable[..., Path]) -> None:
    for bits in (8, 4):
        spec = replace(PLAIN, head_bits=bits)
        real = load_base(save_tiny("llama", AutoModelForCausalLM), AutoModelForCausalLM, spec, CPU)
        empty = build_weightless_base(tiny_config("llama"), AutoModelForCausalLM, spec)
        sizes = [
            {name: (b.shape, b.dtype) for name, b in model.lm_head.named_buffers()}
            for model in (real, empty)
        ]
        assert sizes[0] == sizes[1] != {}


def test_a_tied_head_needs_its_embeddings_on_the_host(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("llama-tied", AutoModelForCausalLM)
    tied = replace(PLAIN, head_bits=8)
    with pytest.raises(UserError, match=r"embed_tokens.weight and lm_head.*embeddings_on_host"):
        load_base(folder, AutoModelForCausalLM, tied, CPU)
    plain = load_base(folder, AutoModelForCausalLM, PLAIN, CPU)
    parted = load_base(folder, AutoModelForCausalLM, replace(tied, embeddings_on_host=True), CPU)
    assert torch.equal(parted.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    expected, found = plain(input_ids=IDS).logits, parted(input_ids=IDS).logits
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_a_model_without_a_plain_head_is_refused() -> None:
    from transformers import AutoModelForSequenceClassification

    spec = replace(PLAIN, head_bits=8)
    with pytest.raises(UserError, match=r"head_bits = 8.*no output head"):
        build_weightless_base(tiny_config("bert"), AutoModelForSequenceClassification, spec)
