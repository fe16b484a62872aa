r"""Rotary position embedding of queries and keys in three passes, forward and back.

Su et al. 2021 (arXiv 2104.09864), in the half-split layout of transformers' Llama family. With the
two halves x1, x2 of a head, and cosines and sines per token and element:

    y1 = x1 cos1 - x2 sin1          dx1 = g1 cos1 + g2 sin2
    y2 = x2 cos2 + x1 sin2          dx2 = g2 cos2 - g1 sin1

transformers builds a turned copy of every head and has autograd take each of its operators back;
here nothing but cosines and sines is kept, which all layers share. Products and sums are rounded
once where theirs are rounded twice. Given up: gradients of gradients, of cosines and of sines.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = heads.shape[-1] // 2
        turned = heads * cos
        turned[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
        turned[..., half:].addcmul_(heads[..., :half], sin[..., half:])
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (cos, sin) = grads, ctx.saved_tensors
        half = g.shape[-1] // 2
        # In (B, T, H, D) order whatever order g comes in: the projections' backward reads rows.
        back = torch.empty(g.shape, dtype=g.dtype, device=g.device)
        torch.mul(g, cos, out=back)
        back[..., :half].addcmul_(g[..., half:], sin[..., half:])
        back[..., half:].addcmul_(g[..., :half], sin[..., :half], value=-1)
        return back, None, None


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every head by its token's position, recording the gradient.

    Args:
        heads: (B, T, H, D), queries or keys.
        cos: (B, T, D) or (1, T, D), in the dtype of `heads`.
        sin: As `cos`.

    Returns:
        (B, T, H, D).
    """
    turned: Tensor = _Rotary.apply(heads, cos.unsqueeze(2), sin.unsqueeze(2))
    return turned
