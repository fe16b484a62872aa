r"""RMSNorm in tiles of tokens, without an fp32 copy of the residual stream.

    n = x / sqrt(mean(x^2) + eps)        in fp32, per token
    y = w * n                            Llama: n rounded to the dtype of x before the product
    y = (1 + w) * n                      Gemma: all in fp32, y rounded at the end

Backward with `g` = dL/dy, `c` = w or 1 + w, r = 1 / sqrt(mean(x^2) + eps), D the width:

    dn = g * c
    dx = r * (dn - n * mean(dn * n))     in fp32, per token

With n = r * x this is r * (dn - x * mean(dn * x) * r^2), which needs x and dn only.

transformers' modules make three or four fp32 tensors the size of the residual stream and keep two
of them; here fp32 exists for one tile, once forward and twice backward, and only `x` is kept (Zhang
and Sennrich 2019, arXiv 1910.07467). Buffers are written over and `x` is read again instead: on a
CPU new pages cost more than another pass, and a tile that is all there is needs no cutting.
Forward is theirs bit for bit; the gradient is the same formula rounded once instead of several
times. Given up: gradients of gradients, and of the weight (a trained norm stays theirs).

Norms are recognised by the name of their transformers class; others keep their own forward.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Style = Literal["llama", "gemma"]
TILE_ELEMENTS = 2**22  # fp32 of one tile: 16 MiB
STYLES: dict[str, Style] = {
    "LlamaRMSNorm": "llama",
    "MistralRMSNorm": "llama",
    "Qwen2RMSNorm": "llama",
    "Qwen3RMSNorm": "llama",
    "Phi3RMSNorm": "llama",
    "SmolLM3RMSNorm": "llama",
    "GemmaRMSNorm": "gemma",
    "Gemma2RMSNorm": "gemma",
    "Gemma3RMSNorm": "gemma",
}


def _wide(x: Tensor, copy: bool = False) -> Tensor:
    """`x` in fp32, as the modules compute; fp64 stays for gradcheck."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=copy)


def _normed(x: Tensor, weight: Tensor, eps: float, style: Style) -> Tensor:
    """`y` of a tile."""
    wide = _wide(x, copy=True)
    r = wide.square_().mean(-1, keepdim=True).add_(eps).rsqrt_()
    n = wide.copy_(x).mul_(r)
    if style == "gemma":
        return n.mul_(1.0 + _wide(weight)).to(x.dtype)
    return weight * n.to(x.dtype)


def _gradient(x: Tensor, g: Tensor, c: Tensor, eps: float) -> Tensor:
    """`dx` of a tile."""
    wide = _wide(x, copy=True)
    dn = wide.square()  # for now: the squares
    mean_square = dn.mean(-1, keepdim=True).add_(eps)
    dn.copy_(g).mul_(c)
    along_x = wide.mul_(dn).mean(-1, keepdim=True).div_(mean_square)
    dn.addcmul_(wide.copy_(x), along_x, value=-1)
    del wide
    return dn.mul_(mean_square.rsqrt_()).to(x.dtype)


def _in_tiles(
    of_tile: Callable[..., Tensor], elements: int, dtype: torch.dtype, *tensors: Tensor
) -> Tensor:
    """`of_tile` of tensors (..., D), in the shape of the first."""
    shape, width = tensors[0].shape, tensors[0].shape[-1]
    tile = max(1, elements // width)
    if tensors[0].numel() <= tile * width:
        return of_tile(*tensors)
    rows = [tensor.reshape(-1, width) for tensor in tensors]
    whole = torch.empty(rows[0].shape, dtype=dtype, device=rows[0].device)
    for *given, part in zip(*(each.split(tile) for each in (*rows, whole)), strict=True):
        part.copy_(of_tile(*given))
    return whole.view(shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, style: Style, tile_elements: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.style, ctx.tile_elements = eps, style, tile_elements
        dtype = x.dtype if style == "gemma" else torch.promote_types(x.dtype, weight.dtype)
        return _in_tiles(lambda part: _normed(part, weight, eps, style), tile_elements, dtype, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        c = _wide(weight) + 1.0 if ctx.style == "gemma" else _wide(weight)
        grad_x = _in_tiles(
            lambda part, g: _gradient(part, g, c, ctx.eps), ctx.tile_elements, x.dtype, x, grad_y
        )
        return grad_x, None, None, None, None


class TiledRMSNorm(nn.Module):
    """Takes the place of a frozen RMSNorm; shares its weight.

    Args:
        weight: (D,).
        eps: Added to the mean square.
        style: How the weight is applied.
        tile_elements: Elements of a tile.
    """

    def __init__(
        self, weight: nn.Parameter, eps: float, style: Style, tile_elements: int = TILE_ELEMENTS
    ) -> None:
        super().__init__()
        self.weight, self.eps, self.style = weight, eps, style
        self.tile_elements = tile_elements

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        y: Tensor = _RMSNorm.apply(x, self.weight, self.eps, self.style, self.tile_elements)
        return y

    def extra_repr(self) -> str:
        """Width and style, for `print(model)`."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}, style={self.style}"


def tile_norms(
    model: nn.Module, tile_elements: int = TILE_ELEMENTS
) -> tuple[list[str], dict[str, str]]:
    """Replace the frozen RMSNorms we know, in this instance.

    Args:
        model: Of transformers.
        tile_elements: Elements of a tile.

    Returns:
        Paths of the replaced ones, and path -> why a norm stays as it is.
    """
    replaced: list[str] = []
    kept: dict[str, str] = {}
    for path, module in list(model.named_modules()):
        kind = type(module).__name__
        if isinstance(module, TiledRMSNorm):
            replaced.append(path)
            continue
        if not kind.endswith(("RMSNorm", "LayerNorm")):
            continue
        style = STYLES.get(kind)
        weight = getattr(module, "weight", None)
        if style is None or not type(module).__module__.startswith("transformers.models."):
            kept[path] = f"{kind} is no norm we know"
        elif not isinstance(weight, nn.Parameter) or weight.requires_grad:
            kept[path] = "it is itself trained"
        else:
            eps = getattr(module, "variance_epsilon", None)
            eps = module.eps if eps is None else eps
            parent, _, name = path.rpartition(".")
            tiled = TiledRMSNorm(weight, float(eps), style, tile_elements)
            setattr(model.get_submodule(parent), name, tiled)
            replaced.append(path)
    return replaced, kept
