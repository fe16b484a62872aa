"""Claims of base/nf4.py: it is the dense layer, it trains through, and it survives evaluation."""

import copy

import bitsandbytes
import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from qlora_trainer.base.nf4 import NF4Linear

CPU = torch.device("cpu")


def make_layer(
    out_features: int = 48,
    in_features: int = 96,
    *,
    compute_dtype: torch.dtype = torch.float32,
    bias: bool = True,
    double_quant: bool = True,
) -> NF4Linear:
    generator = torch.Generator().manual_seed(1)
    return NF4Linear.quantize(
        torch.randn(out_features, in_features, generator=generator),
        torch.randn(out_features, generator=generator) if bias else None,
        compute_dtype=compute_dtype,
        device=CPU,
        double_quant=double_quant,
    )


def dense_twin(layer: NF4Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, layer.dense_weight(), layer.bias)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 96), (96,), (0, 96)])
def test_forward_and_backward_equal_the_dense_layer(
    shape: tuple[int, ...], compute_dtype: torch.dtype, bias: bool, double_quant: bool
) -> None:
    layer = make_layer(compute_dtype=compute_dtype, bias=bias, double_quant=double_quant)
    x = torch.randn(shape, dtype=compute_dtype, requires_grad=True)
    twin_x = x.detach().clone().requires_grad_()
    y, twin_y = layer(x), dense_twin(layer, twin_x)
    assert torch.equal(y, twin_y)
    grad = torch.randn_like(y)
    y.backward(grad)
    twin_y.backward(grad)
    assert x.grad is not None
    assert twin_x.grad is not None
    torch.testing.assert_close(x.grad, twin_x.grad, rtol=1e-2, atol=1e-3) if (
        compute_dtype is torch.bfloat16
    ) else torch.testing.assert_close(x.grad, twin_x.grad)


@pytest.mark.parametrize(("out_features", "in_features"), [(7, 13), (1, 5), (33, 64), (64, 33)])
def test_odd_shapes_equal_the_dense_layer(out_features: int, in_features: int) -> None:
    layer = make_layer(out_features, in_features)
    x = torch.randn(4, in_features)
    assert torch.equal(layer(x), dense_twin(layer, x))


def test_the_dense_weight_in_bf16_is_the_fp32_one_rounded() -> None:
    layer = make_layer()
    assert torch.equal(
        layer.dense_weight(torch.bfloat16), layer.dense_weight(torch.float32).to(torch.bfloat16)
    )


def test_nothing_is_saved_for_the_backward_pass() -> None:
    layer = make_layer()
    saved: list[torch.Size] = []
    x = torch.randn(5, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        layer(x).sum().backward()
    assert saved == []


def test_an_input_of_another_dtype_comes_back_in_its_own() -> None:
    layer = make_layer(compute_dtype=torch.bfloat16)
    x = torch.randn(2, 96, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_gradients_are_the_same_after_evaluating_in_between() -> None:
    layer = make_layer(compute_dtype=torch.bfloat16, bias=False)
    x = torch.randn(4, 96, dtype=torch.bfloat16, requires_grad=True)

    def gradient() -> torch.Tensor:
        (grad,) = torch.autograd.grad(layer.train()(x).float().square().sum(), x)
        return grad

    before, bits = gradient(), layer.codes.clone()
    with torch.no_grad():
        for _ in range(3):
            layer.eval()(x)
    assert torch.equal(gradient(), before)
    assert torch.equal(layer.codes, bits)


def test_the_trap_of_bitsandbytes_own_layer_is_real_and_does_not_reach_ours() -> None:
    """On CPUs with avx512_bf16, one evaluation re-packs `Linear4bit` for good."""
    theirs = bitsandbytes.nn.Linear4bit(
        128, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    theirs.to("cpu")
    if not theirs.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no avx512_bf16, where bitsandbytes re-packs its weights")
    x = torch.randn(4, 128, dtype=torch.bfloat16)
    ours = NF4Linear.from_linear4bit(theirs, compute_dtype=torch.bfloat16, device=CPU)
    expected = ours(x)
    bits = theirs.weight.data.clone()
    with torch.no_grad():
        theirs.eval()(x)
    assert not torch.equal(theirs.weight.data.view(-1), bits.view(-1))  # the trap: changed in place
    with pytest.raises(ValueError, match="rounds its scales"):
        NF4Linear.from_linear4bit(theirs, compute_dtype=torch.bfloat16, device=CPU)
    stuck_x = x.clone().requires_grad_()
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        theirs.train()(stuck_x).sum().backward()
    assert stuck_x.grad is None  # the trap: training again goes through no gradient
    train_x = x.clone().requires_grad_()
    with torch.no_grad():
        ours.eval()(x)
    y = ours.train()(train_x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert train_x.grad is not None
    assert torch.count_nonzero(train_x.grad) > 0


@pytest.mark.parametrize("double_quant", [True, False])
def test_takes_over_a_bitsandbytes_layer_bit_for_bit(double_quant: bool) -> None:
    theirs = bitsandbytes.nn.Linear4bit(
        128, 48, compute_dtype=torch.float32, compress_statistics=double_quant, quant_type="nf4"
    ).to("cpu")
    ours = NF4Linear.from_linear4bit(theirs, compute_dtype=torch.float32, device=CPU)
    dense = bitsandbytes.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(ours.dense_weight(), dense)
    assert torch.equal(ours.bias, theirs.bias)
    assert ours.double_quant == double_quant
    assert (ours.in_features, ours.out_features) == (128, 48)


def test_takes_over_a_layer_stored_in_another_dtype() -> None:
    theirs = bitsandbytes.nn.Linear4bit(
        128, 48, bias=False, quant_type="nf4", quant_storage=torch.bfloat16
    ).to("cpu")
    ours = NF4Linear.from_linear4bit(theirs, compute_dtype=torch.float32, device=CPU)
    dense = bitsandbytes.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(ours.dense_weight(), dense.float())


def test_refuses_a_layer_in_fp4_or_not_quantized_yet() -> None:
    fp4 = bitsandbytes.nn.Linear4bit(64, 64, quant_type="fp4").to("cpu")
    with pytest.raises(ValueError, match="fp4"):
        NF4Linear.from_linear4bit(fp4, compute_dtype=torch.float32, device=CPU)
    raw = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")
    with pytest.raises(ValueError, match="not quantized"):
        NF4Linear.from_linear4bit(raw, compute_dtype=torch.float32, device=CPU)


def test_a_transposed_weight_computes_what_conv1d_does() -> None:
    weight, bias = torch.randn(96, 48), torch.randn(48)
    layer = NF4Linear.quantize(
        weight, bias, compute_dtype=torch.float32, device=CPU, fan_in_fan_out=True
    )
    straight = NF4Linear.quantize(
        weight.t().contiguous(), bias, compute_dtype=torch.float32, device=CPU
    )
    assert (layer.in_features, layer.out_features) == (96, 48)
    assert torch.equal(layer.codes, straight.codes)


@pytest.mark.parametrize("double_quant", [True, False])
def test_weightless_layer_has_the_same_tensors_and_output_shape(double_quant: bool) -> None:
    real = make_layer(double_quant=double_quant)
    empty = NF4Linear.empty(
        96,
        48,
        bias=True,
        compute_dtype=torch.float32,
        device=torch.device("meta"),
        double_quant=double_quant,
    )
    shapes = {name: (t.shape, t.dtype) for name, t in real.state_dict().items()}
    assert {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()} == shapes
    x = torch.randn(3, 96, device="meta", requires_grad=True)
    y = empty(x)
    y.sum().backward()
    assert y.shape == (3, 48)
    assert x.grad is not None
    assert x.grad.is_meta


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_dtype_change_moves_computing_and_not_the_weights(
    dtype: torch.dtype, double_quant: bool
) -> None:
    layer = make_layer(double_quant=double_quant, compute_dtype=torch.bfloat16)
    before = layer.dense_weight(torch.float32)
    nn.Sequential(layer).to(dtype)
    assert layer.compute_dtype == dtype
    assert layer.bias is not None
    assert layer.bias.dtype == dtype
    assert torch.equal(layer.dense_weight(torch.float32), before)


def test_moving_between_devices_keeps_everything() -> None:
    layer = make_layer()
    weightless = copy.deepcopy(layer).to("meta")
    assert all(t.is_meta for t in weightless.state_dict().values())
    assert weightless.compute_dtype == layer.compute_dtype
    assert torch.equal(layer.to("cpu").dense_weight(), make_layer().dense_weight())


def test_state_dict_and_deepcopy_give_the_same_layer() -> None:
    layer = make_layer()
    loaded = NF4Linear.empty(96, 48, bias=True, compute_dtype=torch.float32, device=CPU)
    loaded.load_state_dict(layer.state_dict())
    copied = copy.deepcopy(layer)
    x = torch.randn(2, 96)
    assert torch.equal(loaded(x), layer(x))
    assert torch.equal(copied(x), layer(x))
    copied.codes.zero_()
    assert torch.count_nonzero(layer.codes) > 0


def test_nothing_in_the_layer_wants_a_gradient() -> None:
    assert not any(parameter.requires_grad for parameter in make_layer().parameters())


def test_weights_are_quantized_from_the_dtype_they_come_in() -> None:
    weight = torch.randn(64, 64)
    from_fp32 = NF4Linear.quantize(weight, None, compute_dtype=torch.bfloat16, device=CPU)
    from_bf16 = NF4Linear.quantize(
        weight.to(torch.bfloat16), None, compute_dtype=torch.bfloat16, device=CPU
    )
    assert not torch.equal(from_fp32.absmax, from_bf16.absmax)


def test_the_fused_kernel_computes_the_same_product() -> None:
    for double_quant in (True, False):
        layer = make_layer(48, 128, double_quant=double_quant)
        x = torch.randn(3, 128)
        torch.testing.assert_close(layer._fused_product(x), layer.product(x))
