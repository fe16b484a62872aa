r"""One autograd function for a frozen linear map plus a trained low-rank product.

Forward, with `x` (N, in), frozen `W` (out, in), `A` (r, in), `B` (out, r), scale `s` and the
dropout mask `m` (already divided by 1 - p):

    h = (x * m) A^T                 (N, r)
    y = x W^T + bias + s h B^T      (N, out)    the product is added in place

Backward, with `g` = dL/dy:

    u  = s g B                      (N, r)
    dx = g W + (u A) * m            (N, in)     in place; skipped when nobody needs it
    dA = u^T (x * m)                (r, in)
    dB = s g^T h                    (out, r)

Saved: `x`, `A`, `B`; nothing else. `W` is asked of the base module again (a 4-bit base dequantizes
again), `h` is computed again (2 N in r operations, a thousandth of the layer's), the dropout mask
is drawn again from one integer. Adapters of another dtype than `x` are cast to `x`'s, never `x` to
theirs. Given up: gradients of gradients, and gradients for the base.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from qlora_trainer.lora.kind import dense_bias, dense_weight


def draw_dropout_seed() -> int:
    """One integer from the CPU's random state, enough to draw a dropout mask twice.

    The CPU's state, so that nothing waits for a GPU, and so that recomputation in a checkpointed
    layer, which restores it, draws the same integer. Tensors without values have no seed to give.
    """
    seed = torch.randint(2**62, (), device="cpu")
    return 0 if isinstance(seed, FakeTensor) else int(seed)


def dropout_mask(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Draw the mask for `x`, zeros and 1 / (1 - dropout) in its dtype; the same for one seed."""
    mask = torch.empty_like(x)
    generator = None
    if not x.is_meta and not isinstance(x, FakeTensor):
        generator = torch.Generator(x.device).manual_seed(seed)
    return mask.bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


class LowRankLinearFunction(torch.autograd.Function):
    """`y = base(x) + scale * dropout(x) A^T B^T`; see the module's docstring for the algebra."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        base: nn.Module,
        scale: float,
        dropout: float,
    ) -> Tensor:
        """Return (..., out) for `x` (..., in)."""
        ctx.save_for_backward(x, lora_A, lora_B)
        ctx.base, ctx.scale, ctx.dropout = base, scale, dropout
        ctx.seed = draw_dropout_seed() if dropout else 0
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        y = F.linear(rows, dense_weight(base, x.dtype), dense_bias(base, x.dtype))  # (N, out)
        dropped = rows * dropout_mask(rows, dropout, ctx.seed) if dropout else rows
        h = dropped @ lora_A.to(x.dtype).t()  # (N, r)
        y.addmm_(h, lora_B.to(x.dtype).t(), alpha=scale)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and B, each only where it is needed."""
        x, lora_A, lora_B = ctx.saved_tensors
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        g = grad_y.reshape(-1, grad_y.shape[-1])  # (N, out)
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
        mask = dropout_mask(rows, ctx.dropout, ctx.seed) if ctx.dropout else None
        grad_x = grad_A = grad_B = None
        u = (g @ b).mul_(ctx.scale) if need_x or need_A else None  # (N, r)
        if need_A or need_B:
            dropped = rows if mask is None else rows * mask
            if need_A:
                assert u is not None
                grad_A = (u.t() @ dropped).to(lora_A.dtype)
            if need_B:
                grad_B = (g.t() @ (dropped @ a.t())).mul_(ctx.scale).to(lora_B.dtype)
            del dropped
        if need_x:
            assert u is not None
            grad_x = g @ dense_weight(ctx.base, x.dtype)  # (N, in)
            if mask is None:
                grad_x.addmm_(u, a)
            else:
                grad_x.addcmul_(u @ a, mask)
            grad_x = grad_x.view(x.shape)
        return grad_x, grad_A, grad_B, None, None, None
