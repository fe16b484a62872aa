r"""One autograd function for a frozen linear map plus a trained low-rank product.

Forward, with `x` (N, in), frozen `W` (out, in), `A` (r, in), `B` (out, r), scale `s` and the
dropout mask `m` (already divided by 1 - p):

    h = (x * m) A^T                 (N, r)
    y = x W^T + bias + s h B^T      (N, out)    the product is added in place

Backward, with `g` = dL/dy:

    u  = s g B                      (N, r)
    dx = g W + (u A) * m            (N, in)     in place; skipped when nobody needs it
    dA = u^T (x * m)                (r, in)
    dB = (s h^T g)^T                (out, r)

Saved: `x`, `A`, `B`; nothing else. `W` is asked of the base module again (a 4-bit base dequantizes
again), `h` is computed again (2 N in r operations, a thousandth of the layer's), the dropout mask
is drawn again from one integer. Adapters of another dtype than `x` are cast to `x`'s, never `x` to
theirs. Given up: gradients of gradients, and gradients for the base.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from qlora_trainer.base.weight_parts import as_output, frozen_input_gradient, frozen_product


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


def low_rank_product(
    rows: Tensor,
    base: nn.Module,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
) -> Tensor:
    """`base(rows)`, plus the low-rank product where there are factors: (N, in) -> (N, out)."""
    y = frozen_product(base, rows)  # (N, out)
    if lora_A is not None and lora_B is not None:
        dropped = rows * dropout_mask(rows, dropout, seed) if dropout else rows
        h = dropped @ lora_A.to(rows.dtype).t()  # (N, r)
        y.addmm_(h, lora_B.to(rows.dtype).t(), alpha=scale)
    return y


def low_rank_gradients(
    g: Tensor,
    rows: Tensor,
    base: nn.Module,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of rows (N, in), A and B from `g` (N, out), each only where it is needed.

    Those of the factors are in the dtype of `rows`; without factors only `rows` is asked for.
    """
    need_x, need_A, need_B = needed
    if lora_A is None or lora_B is None:
        return (frozen_input_gradient(base, g) if need_x else None), None, None
    a, b = lora_A.to(rows.dtype), lora_B.to(rows.dtype)
    mask = dropout_mask(rows, dropout, seed) if dropout else None
    grad_x = grad_A = grad_B = None
    u = (g @ b).mul_(scale) if need_x or need_A else None  # (N, r)
    if need_A or need_B:
        dropped = rows if mask is None else rows * mask
        if need_A:
            assert u is not None
            grad_A = u.t() @ dropped
        if need_B:
            grad_B = gradient_of_B(dropped @ a.t(), g, scale)
        del dropped
    if need_x:
        assert u is not None
        grad_x = frozen_input_gradient(base, g)  # (N, in)
        if mask is None:
            grad_x.addmm_(u, a)
        else:
            grad_x.addcmul_(u @ a, mask)
    return grad_x, grad_A, grad_B


def gradient_of_B(h: Tensor, g: Tensor, scale: float) -> Tensor:
    """`scale g^T h` (out, r), made as its transpose: the wide operand is read along its rows."""
    return (h.t() @ g).mul_(scale).t()


def as_factors(
    gradients: Sequence[Tensor | None], factors: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients in the dtypes of their factors; None where either is."""
    return [
        None if gradient is None or factor is None else gradient.to(factor.dtype)
        for gradient, factor in zip(gradients, factors, strict=True)
    ]


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
        y = low_rank_product(rows, base, lora_A, lora_B, scale, dropout, ctx.seed)
        return as_output(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and B, each only where it is needed."""
        x, lora_A, lora_B = ctx.saved_tensors
        g = grad_y.reshape(-1, grad_y.shape[-1])  # (N, out)
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        grad_x, grad_A, grad_B = low_rank_gradients(
            g, rows, ctx.base, lora_A, lora_B, ctx.scale, ctx.dropout, ctx.seed,
            ctx.needs_input_grad[:3],
        )  # fmt: skip
        return (
            None if grad_x is None else grad_x.view(x.shape),
            *as_factors((grad_A, grad_B), (lora_A, lora_B)),
            None,
            None,
            None,
        )
