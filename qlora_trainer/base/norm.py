r"""RMSNorm in tiles of tokens, without an fp32 copy of the residual stream.

    n = x / sqrt(mean(x^2) + eps)        in fp32, per token
    y = w * n                            Llama: n rounded to the dtype of x before the product
    y = (1 + w) * n                      Gemma: all in fp32, y rounded at the end

Backward with `g` = dL/dy, `c` = w or 1 + w, r = 1 / sqrt(mean(x^2) + eps), D the width:

    dn = g * c
    dx = r * (dn - n * mean(dn * n))     in fp32, per token

transformers' modules make three or four fp32 tensors the size of the residual stream and keep two
of them; here fp32 exists for one tile, and only `x` is kept (Zhang and Sennrich 2019, arXiv
1910.07467). Forward is theirs bit for bit; the gradient is the same formula rounded once instead
of several times. Given up: gradients of gradients, and of the weight (a trained norm stays theirs).

Norms are recognised by the name of their transformers class; others keep their own forward.
"""

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


def _wide(x: Tensor) -> Tensor:
    """`x` in fp32, as the modules compute; fp64 stays for gradcheck."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`n` and `r` of a tile, both wide."""
    wide = _wide(x)
    r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide * r, r


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, style: Style, tile_elements: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.style, ctx.tile_elements = eps, style, tile_elements
        width = x.shape[-1]
        rows = x.reshape(-1, width)
        y = torch.empty(
            rows.shape,
            dtype=x.dtype if style == "gemma" else torch.promote_types(x.dtype, weight.dtype),
            device=x.device,
        )
        tile = max(1, tile_elements // width)
        for part, out in zip(rows.split(tile), y.split(tile), strict=True):
            n, _ = _normed(part, eps)
            if style == "gemma":
                out.copy_(n.mul_(1.0 + _wide(weight)))
            else:
                out.copy_(weight * n.to(x.dtype))
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        width = x.shape[-1]
        rows, g = x.reshape(-1, width), grad_y.reshape(-1, width)
        grad_x = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        factor = _wide(weight) + 1.0 if ctx.style == "gemma" else _wide(weight)
        tile = max(1, ctx.tile_elements // width)
        parts = (rows.split(tile), g.split(tile), grad_x.split(tile))
        for part, of_part, out in zip(*parts, strict=True):
            n, r = _normed(part, ctx.eps)
            dn = _wide(of_part) * factor
            mean = (dn * n).mean(-1, keepdim=True)
            out.copy_(dn.sub_(n.mul_(mean)).mul_(r))
        return grad_x.view(x.shape), None, None, None, None


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
