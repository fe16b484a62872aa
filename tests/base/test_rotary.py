"""Rotary embedding in three passes turns heads as transformers does, and turns gradients back."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qlora_trainer.base.rotary import rotate


def angles(tokens: int, head: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 100.0 ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
    angle = torch.cat((angle, angle), dim=-1)[None]  # (1, T, D)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def theirs(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned, _ = apply_rotary_pos_emb(heads, heads, cos, sin, unsqueeze_dim=2)
    return turned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_no_further_from_the_truth_than_transformers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads = torch.randn(2, 7, 3, 8).to(dtype).requires_grad_()
    slope = torch.randn(2, 3, 7, 8).to(dtype).transpose(1, 2)  # as attention hands it back
    cos, sin = angles(7, 8, dtype)
    found = []
    for turn in (rotate, theirs):
        turned = turn(heads, cos, sin)
        (grad,) = torch.autograd.grad(turned, heads, slope)
        found.append((turned.detach().double(), grad.double()))
    exact = heads.detach().double().requires_grad_()
    truth = theirs(exact, cos.double(), sin.double())
    (grad,) = torch.autograd.grad(truth, exact, slope.double())
    for ours, other, expected in zip(*found, (truth.detach(), grad), strict=True):
        error, peer = (ours - expected).norm(), (other - expected).norm()
        assert error <= 1.01 * peer + 1e-9
        assert error <= 4e-3 * expected.norm()


def test_gradients_are_the_derivatives_in_float64() -> None:
    torch.manual_seed(1)
    heads = torch.randn(1, 5, 2, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(5, 6, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (heads,))


def test_gradients_come_in_the_order_the_projections_read_them() -> None:
    heads = torch.randn(2, 5, 3, 4, requires_grad=True)
    cos, sin = angles(5, 4, torch.float32)
    slope = torch.randn(2, 3, 5, 4).transpose(1, 2)
    (grad,) = torch.autograd.grad(rotate(heads, cos, sin), heads, slope)
    assert grad.is_contiguous()
