"""A frozen output head in 8 or 4 bits, of which only a tile of rows is ever dense.

Llama-3.1-8B's head takes 1,002 MiB in 16 bit, 501 in int8 with one scale a row (row-wise absmax,
LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339, section 2.1) and 258 in NF4. A product goes
through the vocabulary tile by tile, dequantizes each, and lets it go; so does the gradient with
respect to the hidden states. Loss (`tasks/linear_cross_entropy.py`), generation and evaluation use
the same two products. Nothing is merged onto it: exports read the original.

Given up: training the head, and a head tied to token embeddings that stay on the device, which
need the 16-bit table whole.

N rows of hidden states, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.base.weight_parts import dense_rows, row_unit
from qlora_trainer.errors import UserError

TILE_ELEMENTS = 2**24  # dense weights of one tile: 32 MiB in 16 bit
_PIECE_ROWS = 4096  # rows quantized at one time


class Int8Rows(nn.Module):
    """A weight (V, D) as int8 codes with one fp32 scale a row.

    Args:
        codes: int8 (V, D).
        scale: fp32 (V, 1); a weight is code * scale.
    """

    codes: Tensor
    scale: Tensor
    unit = 1

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    @classmethod
    def quantize(cls, weight: Tensor) -> "Int8Rows":
        """Round each row (V, D) to 255 levels of its largest magnitude."""
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
        for part, out, factor in zip(
            weight.split(_PIECE_ROWS), codes.split(_PIECE_ROWS), scale.split(_PIECE_ROWS),
            strict=True,
        ):  # fmt: skip
            wide = part.to(torch.float32, copy=True)
            factor.copy_(wide.abs().amax(1, keepdim=True).div_(127).clamp_(min=1e-38))
            out.copy_(wide.div_(factor).round_())
        return cls(codes, scale)

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Dense rows. -> (last - first, D)."""
        codes = self.codes[first:last]
        dense = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        return torch.mul(codes, self.scale[first:last], out=dense)

    def _apply(self, fn: Any, recurse: bool = True) -> "Int8Rows":
        """Follow `model.to(...)`, but for the scales, which 16 bit would round."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.codes.device)
        return self


class NF4Rows(nn.Module):
    """A weight (V, D) in NF4, readable by rows.

    Args:
        layer: Holds it; its bias is not looked at.

    Attributes:
        unit: Tiles begin at multiples of so many rows, where codes and scales begin as well.
    """

    def __init__(self, layer: NF4Linear) -> None:
        super().__init__()
        self.layer = layer
        self.unit = row_unit(layer)

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Dense rows; `first` a multiple of `unit`. -> (last - first, D)."""
        return dense_rows(self.layer, first, last, dtype)


class QuantizedHead(nn.Module):
    """Takes the place of a frozen linear head; stands for its weight in the chunked loss.

    Args:
        weight: The weight, quantized.
        bias: (V,) or None.
        shape: (V, D).
        dtype: Of dense tiles, bias and products.
        tile_elements: Dense weights of one tile, about.
    """

    def __init__(
        self,
        weight: Int8Rows | NF4Rows,
        bias: Tensor | None,
        *,
        shape: tuple[int, int],
        dtype: torch.dtype,
        tile_elements: int = TILE_ELEMENTS,
    ) -> None:
        super().__init__()
        self.held, self.tile_elements = weight, tile_elements
        kept = None if bias is None else bias.to(dtype, copy=True)
        self.bias = None if kept is None else nn.Parameter(kept, requires_grad=False)
        self.shape, self.dtype = shape, dtype
        self.out_features, self.in_features = shape

    @classmethod
    def quantize(
        cls,
        head: nn.Linear,
        *,
        bits: int,
        block_size: int,
        dtype: torch.dtype,
        tile_elements: int = TILE_ELEMENTS,
    ) -> "QuantizedHead":
        """Quantize where the head is: the device never sees it in 16 bit.

        Raises:
            ValueError: A weight is not finite.
        """
        weight = head.weight.detach().to(dtype)
        rows: Int8Rows | NF4Rows
        if bits == 8:
            rows = Int8Rows.quantize(weight)
            if not weight.is_meta and not bool(torch.isfinite(rows.scale).all()):
                raise ValueError("holds values that are not finite (NaN or infinity)")
        else:
            rows = NF4Rows(
                NF4Linear.quantize(
                    weight, None, compute_dtype=dtype, device=weight.device, block_size=block_size
                )
            )
        bias = None if head.bias is None else head.bias.detach()
        shape = (weight.shape[0], weight.shape[1])
        return cls(rows, bias, shape=shape, dtype=dtype, tile_elements=tile_elements)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return next(self.held.buffers()).device

    @property
    def is_meta(self) -> bool:
        """Whether it is weightless."""
        return self.device.type == "meta"

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the vocabulary, and their dense weights (rows, D), made when their turn comes."""
        unit = self.held.unit
        size = max(1, self.tile_elements // (self.in_features * unit)) * unit
        for first in range(0, self.out_features, size):
            last = min(first + size, self.out_features)
            yield slice(first, last), self.held.rows(first, last, self.dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x @ weight.T + bias`, no gradient recorded. x: (N, D) -> (N, V)."""
        return self.product_into(x.new_empty(x.shape[0], self.out_features), x, bias)

    def product_into(self, y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """Write it into `y` (N, V)."""
        for rows, tile in self.tiles():
            y[:, rows] = nn.functional.linear(x, tile, None if bias is None else bias[rows])
        return y

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """`gradient @ weight`, summed over tiles in fp32. (N, V) -> (N, D)."""
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.new_zeros(gradient.shape[0], self.in_features, dtype=wide)
        for rows, tile in self.tiles():
            total += gradient[:, rows] @ tile
        return total.to(gradient.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply, for whoever calls it as a layer. x: (..., D) -> (..., V), in the dtype of x."""
        computed = x.to(self.dtype).reshape(-1, self.in_features)
        y: Tensor = _HeadProduct.apply(computed, self)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedHead":
        """Follow `model.to(...)`: a dtype changes what is computed in."""
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        return self

    def extra_repr(self) -> str:
        """What `print(model)` says of this head."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _HeadProduct(torch.autograd.Function):
    """y = x W^T + b with W frozen, in tiles both ways; nothing of the batch is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: QuantizedHead) -> Tensor:
        ctx.head = head
        return head.product(x, head.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return ctx.head.input_gradient(grads[0]) if ctx.needs_input_grad[0] else None, None


def quantize_head(
    model: Any, bits: int, block_size: int, dtype: torch.dtype, *, on_host: bool
) -> None:
    """Put a quantized head in the place of the model's own.

    Args:
        model: As transformers made it, with weights or on `meta`.
        bits: 8 or 4.
        block_size: Weights that share one NF4 scale.
        dtype: What products are computed in.
        on_host: Token embeddings stay on the host, so a table tied to the head can.

    Raises:
        UserError: The model has no plain head, it is tied to embeddings the device needs whole,
            or holds weights that are not finite.
    """
    said = f"model.head_bits = {bits}"
    head = plain_head(model, said, "set model.head_bits: 16")
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is head.weight]
    if len(names) > 1 and not on_host:
        raise UserError(
            f"{said}: one weight serves as {' and '.join(names)}, and looking tokens up needs it "
            "in 16 bit; a second copy would take more, not less. Set model.embeddings_on_host: "
            "true beside it, or model.head_bits: 16"
        )
    try:
        quantized = QuantizedHead.quantize(head, bits=bits, block_size=block_size, dtype=dtype)
    except ValueError as error:
        raise UserError(f"{names[0]} {error}; the checkpoint is damaged or unfit") from error
    put_head(model, head, quantized)
    if len(names) > 1:
        model.config.tie_word_embeddings = False


def plain_head(model: Any, said: str, instead: str) -> nn.Linear:
    """The model's output head, a linear layer and nothing else.

    Args:
        model: As transformers made it.
        said: The setting that asks, and its value.
        instead: The way out.

    Raises:
        UserError: It has none.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is nn.Linear:
        return head
    found = "no output head" if head is None else f"a {type(head).__name__} for its head"
    raise UserError(
        f"{said}: {type(model).__name__} has {found}, not a plain linear layer; {instead}"
    )


def put_head(model: Any, head: nn.Module, ours: nn.Module) -> None:
    """Put a head of ours in the place of the model's own."""
    path = next(path for path, module in model.named_modules() if module is head)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, ours)
