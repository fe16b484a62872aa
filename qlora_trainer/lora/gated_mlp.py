r"""A whole gated MLP as one autograd function: gate, up, activation and down with their adapters.

With `x` (N, D), each projection P in {gate, up, down} a frozen base plus a low-rank product
(`lora/function.py` has its algebra and its two gradients), activation `f`:

    z = gate(x)          u = up(x)          (N, F)
    h = f(z) * u                            (N, F)
    y = down(h)                             (N, D)

Backward, with `g` = dL/dy; P^T is the projection's gradient with respect to its input, (dA, dB)
those of its factors:

    dh = down^T(g)        (dA, dB)_down  from (g, h)
    du = dh * f(z)        (dA, dB)_up    from (du, x)
    dz = dh * u * f'(z)   (dA, dB)_gate  from (dz, x)
    dx = up^T(du) + gate^T(dz)

Saved: `x` and the factors. `z` and `u` are computed again, tile by tile along the tokens: of the
F-sized tensors only a tile's few are ever alive. Where memory is left they may be kept instead
(`keeps_inner`): two F-sized tensors, of which plain modules keep four. Gradients of the factors are
summed over tiles in fp32 (fp64 for fp64). Gate and up are computed together (`projections.py`),
with dropout one by one: a tile draws its masks from seed + its number, and one tile over all tokens
then computes bit for bit what the separate modules compute. Phi stores gate and up as one
projection, whose two halves these are.

The function comes in two parts so that a checkpointed layer computes nothing in vain: `_Enter`
saves and passes `x` on, `_Leave` computes y. Recomputation stops as soon as what the backward needs
has been saved again (torch's early stop), so it stops before y where y itself is not needed; and
since y has the shape of `x`, `_Leave` hands dL/dy back through the same edge to `_Enter`, which
computes the gradients.

Given up: gradients of gradients, trained biases, MLPs with unequal input and output sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_trainer.base.weight_parts import as_output
from qlora_trainer.lora.function import as_factors
from qlora_trainer.lora.projections import Projection, project, projection_gradients

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def activate(name: str, z: Tensor) -> Tensor:
    """`f(z)` for one of `ACTIVATIONS`."""
    if name == "silu":
        return F.silu(z)
    return F.gelu(z, approximate="tanh" if name == "gelu_tanh" else "none")


def activation_gradient(name: str, g: Tensor, z: Tensor) -> Tensor:
    """`g * f'(z)`."""
    aten = torch.ops.aten
    if name == "silu":
        return cast(Tensor, aten.silu_backward.default(g, z))
    approximate = "tanh" if name == "gelu_tanh" else "none"
    return cast(Tensor, aten.gelu_backward.default(g, z, approximate=approximate))


@dataclass(frozen=True)
class GatedMLP:
    """The MLP as the function sees it: (gate, up, down), or (gate and up in one, down)."""

    projections: tuple[Projection, ...]
    activation: str
    tile_tokens: int | None
    keeps_inner: bool = False

    def spans(self, tokens: int) -> list[tuple[int, int]]:
        """Where tiles begin and end."""
        size = self.tile_tokens or max(tokens, 1)
        return [(first, min(first + size, tokens)) for first in range(0, max(tokens, 1), size)]

    def inner(self, rows: Tensor, tile: int) -> tuple[Tensor, Tensor]:
        """`z` and `u` of one tile."""
        *into, _ = self.projections
        projected = project(rows, into, tile)
        z, u = projected[0].chunk(2, dim=-1) if len(into) == 1 else projected
        return z, u

    def forward(self, rows: Tensor, keep: list[Tensor] | None = None) -> Tensor:
        """(N, D) -> (N, D), a tile at a time; `z` and `u` of every tile go to `keep`."""
        spans = self.spans(rows.shape[0])
        if len(spans) == 1:
            return self._tile(rows, 0, keep)
        y = torch.empty_like(rows)
        for tile, (first, last) in enumerate(spans):
            y[first:last] = self._tile(rows[first:last], tile, keep)
        return y

    def _tile(self, rows: Tensor, tile: int, keep: list[Tensor] | None) -> Tensor:
        z, u = self.inner(rows, tile)
        h = activate(self.activation, z).mul_(u)
        if keep is not None:
            keep += z, u
        del z, u
        return self.projections[-1].forward(h, tile)

    def backward(
        self, g: Tensor, rows: Tensor, needed: Sequence[bool], kept: Sequence[Tensor] = ()
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of rows and of every projection's A and B.

        Args:
            g: dL/dy, (N, D).
            rows: (N, D).
            needed: Of rows, then of each projection's A and B.
            kept: `z` and `u` of every tile, as `forward` gave them; without, computed again.
        """
        spans = self.spans(rows.shape[0])
        inner: list[tuple[Tensor, Tensor] | None] = [None] * len(spans)
        if kept:
            inner = [*zip(kept[::2], kept[1::2], strict=True)]
        if len(spans) == 1:
            return self._tile_backward(g, rows, 0, needed, inner[0])
        grad_rows = torch.empty_like(rows) if needed[0] else None
        sums: list[Tensor | None] = [None] * (len(needed) - 1)
        for tile, (first, last) in enumerate(spans):
            part, factors = self._tile_backward(
                g[first:last], rows[first:last], tile, needed, inner[tile]
            )
            if grad_rows is not None and part is not None:
                grad_rows[first:last] = part
            del part
            for index, gradient in enumerate(factors):
                if gradient is None:
                    continue
                held = sums[index]
                if held is None:
                    wide = torch.promote_types(gradient.dtype, torch.float32)
                    sums[index] = gradient.to(wide)
                else:
                    held.add_(gradient)
        return grad_rows, sums

    def _tile_backward(
        self,
        g: Tensor,
        rows: Tensor,
        tile: int,
        needed: Sequence[bool],
        kept: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        *into, down = self.projections
        need_x, need_into, need_down = needed[0], needed[1:-2], needed[-2:]
        if not need_x and not any(need_into) and not any(need_down):
            return None, [None] * (len(needed) - 1)
        z, u = self.inner(rows, tile) if kept is None else kept
        through = need_x or any(need_into)  # whether anything before `down` is wanted
        activated = activate(self.activation, z)
        h = activated * u if any(need_down) else activated  # without factors h is not looked at
        dh, *of_down = down.backward(g, h, tile, (through, *need_down))
        del h
        if dh is None:
            return None, [*[None] * len(need_into), *of_down]
        du = activated.mul_(dh)
        del activated
        dz = activation_gradient(self.activation, dh.mul_(u), z)
        del dh, u, z
        of_inner = [dz, du] if len(into) == 2 else [torch.cat((dz, du), dim=-1)]
        del dz, du
        dx, of_into = projection_gradients(of_inner, rows, into, (need_x, *need_into), tile)
        return dx, [*of_into, *of_down]


class _Enter(torch.autograd.Function):
    """Save what the backward needs and pass `x` on; its backward is the whole MLP's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: GatedMLP, *factors: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, *factors)
        ctx.mlp = mlp
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_y)


class _Keep(torch.autograd.Function):
    """The MLP at one go, for a layer that keeps its activations: `z` and `u` are saved besides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: GatedMLP, *factors: Tensor | None) -> Tensor:
        kept: list[Tensor] = []
        y = mlp.forward(x.reshape(-1, x.shape[-1]), kept)
        ctx.save_for_backward(x, *factors, *kept)
        ctx.mlp = mlp
        return as_output(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_y)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    need_x, _, *need_factors = ctx.needs_input_grad
    x, *saved = ctx.saved_tensors
    factors, kept = saved[: len(need_factors)], saved[len(need_factors) :]
    width = x.shape[-1]
    grad_rows, gradients = ctx.mlp.backward(
        grad_y.reshape(-1, width), x.reshape(-1, width), (need_x, *need_factors), kept
    )
    of_x = None if grad_rows is None else grad_rows.view(x.shape)
    return of_x, None, *as_factors(gradients, factors)


class _Leave(torch.autograd.Function):
    """Compute y and save nothing; dL/dy goes back to `_Enter` through x's edge."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: GatedMLP) -> Tensor:
        return as_output(mlp.forward(x.reshape(-1, x.shape[-1])), x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def gated_mlp(x: Tensor, mlp: GatedMLP) -> Tensor:
    """`down(f(gate(x)) * up(x))` for `x` (..., D), recording its gradients."""
    factors = [factor for projection in mlp.projections for factor in projection.factors]
    seeded = GatedMLP(
        tuple(projection.drawn() for projection in mlp.projections),
        mlp.activation,
        mlp.tile_tokens,
        mlp.keeps_inner,
    )
    if mlp.keeps_inner:
        kept: Tensor = _Keep.apply(x, seeded, *factors)
        return kept
    y: Tensor = _Leave.apply(_Enter.apply(x, seeded, *factors), seeded)
    return y
