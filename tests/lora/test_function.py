"""The fused function equals its plain twin, saves three tensors, and computes nothing unneeded."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.base.weight_parts import dense_weight
from qlora_trainer.lora.function import LowRankLinearFunction, dropout_mask
from qlora_trainer.lora.layer import LowRankLayer

CPU = torch.device("cpu")
IN, OUT, RANK = 64, 32, 4


def plain_low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    mask: Tensor | None = None,
) -> Tensor:
    """weight: (out, in), lora_A: (r, in), lora_B: (out, r); mask holds zeros and 1 / (1 - p)."""
    dropped = x if mask is None else x * mask
    product = dropped @ lora_A.to(x.dtype).t() @ lora_B.to(x.dtype).t()
    return F.linear(x, weight, bias) + scale * product


def make_base(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    if kind == "conv1d":
        return Conv1D(OUT, IN).to(dtype).requires_grad_(False)
    linear = nn.Linear(IN, OUT, bias=kind != "no bias").to(dtype).requires_grad_(False)
    if kind.startswith("nf4"):
        turned = kind == "nf4 conv1d"
        weight = linear.weight.t().contiguous() if turned else linear.weight
        return NF4Linear.quantize(
            weight, linear.bias, compute_dtype=dtype, device=CPU, fan_in_fan_out=turned
        )
    return linear


def make_layer(
    kind: str, dtype: torch.dtype = torch.float32, adapter: torch.dtype | None = None, **more
) -> LowRankLayer:
    layer = LowRankLayer(
        make_base(kind, dtype), name="m", rank=RANK, scale=0.5, dtype=adapter or dtype, **more
    )
    nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(2))
    return layer


def twin(layer: LowRankLayer, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    weight = dense_weight(layer.base, x.dtype)
    bias = layer.base.bias
    return plain_low_rank_linear(x, weight, bias, layer.lora_A, layer.lora_B, layer.scale, mask)


def gradients(y: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return torch.autograd.grad((y * weights).sum(), inputs)


def make_input(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(4))
    return x.to(dtype).requires_grad_()


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_the_derivatives_in_float64(kind: str, dropout: float) -> None:
    layer = make_layer(kind, torch.float64)

    def run(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)  # the same mask at every probe
        return LowRankLinearFunction.apply(x, a, b, layer.base, 0.5, dropout)

    x = make_input(torch.float64)[:, :2].detach().requires_grad_()
    assert torch.autograd.gradcheck(run, (x, layer.lora_A, layer.lora_B), fast_mode=True)


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d", "nf4", "nf4 conv1d"])
def test_fused_equals_the_plain_twin(kind: str) -> None:
    layer, x = make_layer(kind), make_input()
    parts = (x, layer.lora_A, layer.lora_B)
    fused, plain = layer(x), twin(layer, x)
    torch.testing.assert_close(fused, plain)
    for ours, theirs in zip(gradients(fused, *parts), gradients(plain, *parts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_fused_dropout_equals_the_plain_twin_with_the_same_mask() -> None:
    layer, x = make_layer("nf4", dropout=0.4), make_input()
    torch.manual_seed(11)
    fused = layer(x)
    rows = x.detach().view(-1, IN)
    torch.manual_seed(11)
    seed = int(torch.randint(2**62, ()))
    mask = dropout_mask(rows, 0.4, seed).view(x.shape)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    plain = twin(layer, x, mask)
    parts = (x, layer.lora_A, layer.lora_B)
    torch.testing.assert_close(fused, plain)
    for ours, theirs in zip(gradients(fused, *parts), gradients(plain, *parts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_only_and_differs_between_calls() -> None:
    layer, x = make_layer("linear", dropout=0.5), make_input()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), twin(layer, x))


@pytest.mark.parametrize("kind", ["linear", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", [None, torch.float32])
def test_half_precision_input_with_half_or_full_precision_factors(
    kind: str, dtype: torch.dtype, adapter: torch.dtype | None
) -> None:
    layer = make_layer(kind, dtype, adapter)
    x = make_input(dtype)
    y = layer(x)
    assert y.dtype == dtype
    grads = gradients(y, x, layer.lora_A, layer.lora_B)
    assert [g.dtype for g in grads] == [dtype, adapter or dtype, adapter or dtype]
    exact = copy.deepcopy(layer)
    weight = dense_weight(layer.base, dtype).double()
    full = x.detach().double().requires_grad_()
    a, b = (p.detach().to(dtype).double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    plain = plain_low_rank_linear(full, weight, layer.base.bias.double(), a, b, exact.scale)
    tolerance = 0.02 if dtype == torch.bfloat16 else 0.005
    expected = [plain, *gradients(plain, full, a, b)]
    for ours, theirs in zip([y, *grads], expected, strict=True):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def test_a_4_bit_base_computes_in_its_own_dtype_and_answers_in_the_asked_one() -> None:
    layer, x = make_layer("nf4", torch.bfloat16), make_input(torch.float32)
    recorded = layer(x)
    assert recorded.dtype == torch.float32
    torch.testing.assert_close(recorded, twin(layer, x.bfloat16()).float(), rtol=0.02, atol=0.02)
    assert torch.equal(recorded, recorded.bfloat16().float())
    recorded.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_only_input_and_factors_are_saved(dropout: float) -> None:
    layer, x = make_layer("nf4", torch.bfloat16, torch.float32, dropout=dropout), make_input()
    x = x.detach().bfloat16().requires_grad_()
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    pointers = {t.data_ptr() for t in saved}
    assert pointers == {x.data_ptr(), layer.lora_A.data_ptr(), layer.lora_B.data_ptr()}


class CountingBase(nn.Linear):
    dense = 0

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        self.dense += 1
        return self.weight.to(dtype)


def test_an_input_without_gradient_costs_no_second_dense_weight() -> None:
    layer = LowRankLayer(CountingBase(IN, OUT), name="m", rank=RANK, scale=1.0)
    x = make_input()
    layer(x.detach()).sum().backward()
    assert layer.base.dense == 1
    assert layer.lora_B.grad is not None
    layer(x).sum().backward()
    assert layer.base.dense == 3


def test_frozen_factors_still_pass_the_gradient_on() -> None:
    layer, x = make_layer("nf4"), make_input()
    layer.requires_grad_(False)
    (ours,) = gradients(layer(x), x)
    (theirs,) = gradients(twin(layer, x), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_checkpointing_changes_no_bit(kind: str, reentrant: bool) -> None:
    layer, x = make_layer(kind, dropout=0.3), make_input()
    results = []
    for run in (layer, lambda z: checkpoint(layer, z, use_reentrant=reentrant)):
        torch.manual_seed(5)
        layer.zero_grad()
        x.grad = None
        y = run(x)
        y.square().sum().backward()
        results.append([y, x.grad, layer.lora_A.grad, layer.lora_B.grad])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_runs_without_values_on_meta(kind: str, dropout: float) -> None:
    layer = make_layer(kind, dropout=dropout).to("meta")
    x = torch.empty(2, 3, IN, device="meta", requires_grad=True)
    y = layer(x)
    assert y.shape == (2, 3, OUT)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.lora_A.grad.shape == (RANK, IN)
    assert layer.lora_B.grad.shape == (OUT, RANK)


def test_runs_under_fake_tensors_with_dropout() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        layer = LowRankLayer(nn.Linear(IN, OUT), name="m", rank=RANK, scale=1.0, dropout=0.5)
        y = layer(torch.empty(3, IN, requires_grad=True))
        y.sum().backward()
    assert layer.lora_A.grad.shape == (RANK, IN)


@pytest.mark.parametrize("shape", [(IN,), (0, IN), (2, 3, 4, IN)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer = make_layer("linear")
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, twin(layer, x))
    y.sum().backward()
    assert x.grad.shape == shape


def test_transposed_input_and_gradient_need_not_be_contiguous() -> None:
    layer = make_layer("linear")
    x = torch.randn(IN, 3, 2).transpose(0, 2).requires_grad_()
    y = layer(x)
    weights = torch.randn(OUT, 3, 2).transpose(0, 2)
    (ours,) = torch.autograd.grad((y * weights).sum(), x)
    (theirs,) = torch.autograd.grad((twin(layer, x) * weights).sum(), x)
    torch.testing.assert_close(ours, theirs)
