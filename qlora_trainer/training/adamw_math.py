"""AdamW's arithmetic in plain PyTorch, and fp32 values kept as bf16 and the 16 bits below it.

All of it is elementwise: tensors joined end to end get the same bits as each for itself.
"""

import torch
from torch import Tensor


def plain_adamw(
    value: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW update in plain PyTorch, in place; what every kernel is held against.

    The gradient is used up: its memory holds the denominator afterwards.
    """
    first.lerp_(gradient, 1.0 - betas[0])
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1.0 - betas[1])
    if weight_decay != 0.0:
        value.mul_(1.0 - lr * weight_decay)
    scale = torch.div(second, 1.0 - betas[1] ** step, out=gradient).sqrt_().add_(eps)
    value.addcdiv_(first, scale, value=-lr / (1.0 - betas[0] ** step))


def join_bf16(value: Tensor, remainder: Tensor) -> Tensor:
    """Complete fp32 values, in place, that hold bf16 ones by the signed 16 bits below them."""
    value.view(torch.int32).add_(remainder)
    return value


def split_bf16(value: Tensor, remainder: Tensor) -> Tensor:
    """Round fp32 values, in place, to ones that bf16 holds; keep what was lost as signed bits."""
    bits = value.view(torch.int32)
    remainder.copy_(bits)  # the low 16; as a signed number it says which way the rounding goes
    bits.add_(0x8000).bitwise_and_(-0x10000)
    return value
