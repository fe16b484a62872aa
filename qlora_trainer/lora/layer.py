"""The low-rank layer: one wrapper around any base module, `base(x) + scale * product(x)`.

The base stays frozen and whole in `.base`; the trained factors are the plain parameters `lora_A`
and `lora_B` in PEFT's shapes (LoRA: Hu et al. 2021, arXiv 2106.09685). What differs between a
linear map, a convolution and an embedding is a `Kind`, not a class. Linear maps run in one fused
autograd function; evaluation without gradients goes through the base's own forward, which may know
a faster kernel for few rows.
"""

import hashlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_trainer.lora.function import LowRankLinearFunction
from qlora_trainer.lora.kind import Kind, is_plain_linear, kind_of


class LowRankLayer(nn.Module):
    """A frozen base module plus a trained low-rank product.

    Args:
        base: The module to wrap; its parameters are frozen.
        name: Its path in the model; with `seed` it decides the first values of the factors, so
            they depend neither on the order of modules nor on which others carry adapters.
        rank: Inner size of the product.
        scale: Factor of the product.
        dropout: Probability of dropping an input element of the product's path.
        dtype: Of the factors; the product is computed in the input's dtype.
        seed: Any whole number.

    Attributes:
        enabled: Off, the layer is its base.
        reached: Set once the layer has run while enabled; `train` clears and reads it.

    Raises:
        TypeError: No adapter fits this module.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        base: nn.Module,
        *,
        name: str,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        kind = kind_of(base)
        if kind is None:
            raise TypeError(f"{name}: no low-rank adapter fits a {type(base).__name__}")
        self.kind: Kind = kind
        self.base = base.requires_grad_(False)
        self.name, self.rank, self.scale, self.dropout = name, rank, scale, dropout
        self.enabled, self.reached = True, False
        self.fused = kind.name in ("linear", "conv1d") and is_plain_linear(base)
        device = next(tensor.device for tensor in (*base.parameters(), *base.buffers()))
        shape_A, shape_B = kind.shapes(base, rank)
        self.lora_A = nn.Parameter(torch.empty(shape_A, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(shape_B, dtype=dtype, device=device))
        if device.type != "meta":
            self.reset_factors(seed)

    @torch.no_grad()
    def reset_factors(self, seed: int) -> None:
        """Give the factors PEFT's first values: one zero, the other random from seed and name."""
        digest = hashlib.blake2b(f"{seed}:{self.name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        if self.kind.zero_factor == "lora_A":
            drawn, zero = self.lora_B, self.lora_A
            values = torch.empty(drawn.shape).normal_(generator=generator)
        else:
            drawn, zero = self.lora_A, self.lora_B
            values = torch.empty(drawn.shape)
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        drawn.copy_(values)
        zero.zero_()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the scaled product; the output has the base's shape and dtype."""
        if not self.enabled:
            return self.base(x, *args, **kwargs)
        self.reached = True
        dropout = self.dropout if self.training else 0.0
        if self.fused and (self.training or torch.is_grad_enabled()):
            # Training without recording is a checkpoint's first pass: the same bits are due.
            # A 4-bit base says what it computes in, and answers in the dtype it was asked in.
            computed = x.to(getattr(self.base, "compute_dtype", x.dtype))
            return LowRankLinearFunction.apply(
                computed, self.lora_A, self.lora_B, self.base, self.scale, dropout
            ).to(x.dtype)
        y = self.base(x, *args, **kwargs)

        def drop(z: Tensor) -> Tensor:
            return F.dropout(z, dropout) if dropout else z

        product = self.kind.product(self.base, x, self.lora_A, self.lora_B, drop).to(y.dtype)
        return torch.add(y, product, alpha=self.scale)

    def __getattr__(self, name: str) -> Any:
        # Model code asks its modules for `weight.dtype`, `in_features`, `embed_scale`. Not for the
        # dense weight: whoever multiplies with that would pass the adapter by.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "dense_weight"):
                raise
            return getattr(self.base, name)

    def extra_repr(self) -> str:
        """Kind, rank and scale, for `print(model)`."""
        return f"kind={self.kind.name}, rank={self.rank}, scale={self.scale:g}"
