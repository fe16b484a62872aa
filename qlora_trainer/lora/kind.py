"""The few ways a low-rank product meets a base module: shapes of A and B, and how to apply them.

    kind        base modules                                A                   B
    linear      nn.Linear, any module with `dense_weight`   (r, in)             (out, r)
    conv1d      transformers' Conv1D (weight stored (in, out)), plain or 4-bit  as linear
    conv2d      nn.Conv2d, one group, not dilated           (r, in, kh, kw)     (out, r, 1, 1)
    embedding   nn.Embedding                                (r, rows)           (D, r)

Shapes, first values and names in files are PEFT's. The zero-initialised factor is B, for an
embedding A: the first product is zero, and that factor is the one with a gradient after one step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_trainer.lora.merge import KindName

Shapes = tuple[tuple[int, ...], tuple[int, ...]]
Drop = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Kind:
    """How one sort of base module carries a low-rank product.

    Attributes:
        name: Also the name `merge` knows it by.
        shapes: Shapes of A and B for a base module and a rank.
        product: The unscaled product for (base, x, A, B, dropout), without the base.
        zero_factor: The factor that starts at zero.
        file_keys: What follows the module's path in PEFT's files, for A and B.
    """

    name: KindName
    shapes: Callable[[Any, int], Shapes]
    product: Callable[[Any, Tensor, Tensor, Tensor, Drop], Tensor]
    zero_factor: str = "lora_B"
    file_keys: tuple[str, str] = ("lora_A.weight", "lora_B.weight")


def _linear_shapes(base: Any, rank: int) -> Shapes:
    if isinstance(base, Conv1D):
        return (rank, base.nx), (base.nf, rank)
    return (rank, base.in_features), (base.out_features, rank)


def _linear_product(base: Any, x: Tensor, a: Tensor, b: Tensor, drop: Drop) -> Tensor:
    return F.linear(F.linear(drop(x), a.to(x.dtype)), b.to(x.dtype))


def _conv2d_shapes(base: Any, rank: int) -> Shapes:
    return (rank, base.in_channels, *base.kernel_size), (base.out_channels, rank, 1, 1)


def _conv2d_product(base: Any, x: Tensor, a: Tensor, b: Tensor, drop: Drop) -> Tensor:
    inner = F.conv2d(drop(x), a.to(x.dtype), stride=base.stride, padding=base.padding)
    return F.conv2d(inner, b.to(x.dtype))


def _embedding_shapes(base: Any, rank: int) -> Shapes:
    return (rank, base.num_embeddings), (base.embedding_dim, rank)


def _embedding_product(base: Any, ids: Tensor, a: Tensor, b: Tensor, drop: Drop) -> Tensor:
    # No dropout, as PEFT. Scaled embeddings (Gemma) scale what the table gives, so ours as well.
    inner = F.embedding(ids, a.t(), padding_idx=base.padding_idx)  # (..., r)
    product = F.linear(inner, b)
    scale = getattr(base, "embed_scale", None)
    return product if scale is None else product * scale


LINEAR = Kind("linear", _linear_shapes, _linear_product)
CONV1D = Kind("conv1d", _linear_shapes, _linear_product)
CONV2D = Kind("conv2d", _conv2d_shapes, _conv2d_product)
EMBEDDING = Kind(
    "embedding",
    _embedding_shapes,
    _embedding_product,
    zero_factor="lora_A",
    file_keys=("lora_embedding_A", "lora_embedding_B"),
)


def kind_of(module: nn.Module) -> Kind | None:
    """Kind of a base module; None where no adapter of ours fits.

    A dilated, grouped or reflecting convolution has none: PEFT's product would not match it. A
    subclass of nn.Linear whose weight is not a plain (out, in) matrix (packed 4-bit) has none.
    """
    if hasattr(module, "dense_weight"):
        return CONV1D if getattr(module, "fan_in_fan_out", False) else LINEAR
    if isinstance(module, Conv1D):
        return CONV1D
    if isinstance(module, nn.Linear):
        plain = module.weight.is_floating_point() and module.weight.shape == (
            module.out_features,
            module.in_features,
        )
        return LINEAR if plain else None
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and set(module.dilation) == {1}
        return CONV2D if plain and module.padding_mode == "zeros" else None
    return EMBEDDING if isinstance(module, nn.Embedding) else None


def is_plain_linear(base: nn.Module) -> bool:
    """Whether `x W^T + bias` is all the base does, so that the fused function may do it instead."""
    if hasattr(base, "dense_weight"):
        return True
    return type(base).forward in (nn.Linear.forward, Conv1D.forward)
