r"""Several frozen linear maps of one input, each with its low-rank product, computed together.

With `x` (N, in), frozen `W_i` (out_i, in), `A_i` (r_i, in), `B_i` (out_i, r_i), scales `s_i`, and
[...] putting factors one after another along their rank, R = sum of r_i:

    h   = x [A_1; A_2; ...]^T                   (N, R)
    y_i = x W_i^T + bias_i + s_i h_i B_i^T      (N, out_i)

Backward, with `g_i` = dL/dy_i:

    u    = [s_1 g_1 B_1, s_2 g_2 B_2, ...]      (N, R)
    dx   = g_1 W_1 + g_2 W_2 + ... + u [A_1; A_2; ...]      (N, in), summed in place
    dA   = u^T x                                (R, in), whose rows are dA_1, dA_2, ...
    dB_i = (s_i h_i^T g_i)^T                    (out_i, r_i)

Products with a factor are narrow: one of 3 r columns costs little more than one of r. And dx is one
sum in place where separate maps make one tensor each and have autograd add them. Saved: `x` and the
factors, as in `lora/function.py`; what is computed again there is computed again here. Maps with
dropout draw a mask each, so they are computed one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_trainer.base.weight_parts import as_output, frozen_input_gradient, frozen_product
from qlora_trainer.lora.function import (
    as_factors,
    draw_dropout_seed,
    gradient_of_B,
    low_rank_gradients,
    low_rank_product,
)
from qlora_trainer.lora.layer import LowRankLayer


@dataclass(frozen=True)
class Projection:
    """One linear map, its factors (or none) and its dropout of this call."""

    base: nn.Module
    lora_A: Tensor | None
    lora_B: Tensor | None
    scale: float = 1.0
    dropout: float = 0.0
    seed: int = 0

    @classmethod
    def of(cls, module: Any) -> "Projection":
        """A module as it stands now: adapted and switched on, or its base alone."""
        if not isinstance(module, LowRankLayer):
            return cls(module, None, None)
        if not module.enabled:
            return cls(module.base, None, None)
        module.reached = True
        dropout = module.dropout if module.training else 0.0
        return cls(module.base, module.lora_A, module.lora_B, module.scale, dropout)

    def drawn(self) -> "Projection":
        """With this call's dropout seed, the factors out of autograd's sight."""
        return Projection(
            self.base,
            None if self.lora_A is None else self.lora_A.detach(),
            None if self.lora_B is None else self.lora_B.detach(),
            self.scale,
            self.dropout,
            draw_dropout_seed() if self.dropout else 0,
        )

    def forward(self, rows: Tensor, tile: int) -> Tensor:
        """(N, in) -> (N, out)."""
        return low_rank_product(
            rows, self.base, self.lora_A, self.lora_B, self.scale, self.dropout, self.seed + tile
        )

    def backward(
        self, g: Tensor, rows: Tensor, tile: int, needed: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of rows, A and B."""
        return low_rank_gradients(
            g, rows, self.base, self.lora_A, self.lora_B, self.scale, self.dropout,
            self.seed + tile, needed,
        )  # fmt: skip

    @property
    def factors(self) -> tuple[Tensor | None, Tensor | None]:
        """A and B."""
        return self.lora_A, self.lora_B

    @property
    def rank(self) -> int:
        """Zero without an adapter."""
        return 0 if self.lora_A is None else self.lora_A.shape[0]


def project(rows: Tensor, projections: Sequence[Projection], tile: int = 0) -> list[Tensor]:
    """(N, in) -> (N, out_i) for each."""
    if _one_by_one(projections):
        return [projection.forward(rows, tile) for projection in projections]
    h = rows @ _joined_A(projections, rows.dtype).t()  # (N, R)
    projected = []
    for projection, h_i in zip(projections, _by_projection(h, projections, dim=1), strict=True):
        y = frozen_product(projection.base, rows)
        if projection.lora_B is not None:
            y.addmm_(h_i, projection.lora_B.to(rows.dtype).t(), alpha=projection.scale)
        projected.append(y)
    return projected


def projection_gradients(
    gradients: list[Tensor],
    rows: Tensor,
    projections: Sequence[Projection],
    needed: Sequence[bool],
    tile: int = 0,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of rows, and of every projection's A and B.

    Args:
        gradients: dL/dy_i, (N, out_i); given up one by one, so that each may be freed.
        rows: (N, in).
        projections: In the order of `gradients`.
        needed: Of rows, then of each projection's A and B.
        tile: As in `project`.
    """
    need_x, *need_factors = needed
    if _one_by_one(projections):
        return _gradients_one_by_one(gradients, rows, projections, needed, tile)
    of_factors: list[Tensor | None] = [None] * len(need_factors)
    u = None
    joined = _joined_A(projections, rows.dtype)
    if any(need_factors[1::2]):
        h = rows @ joined.t()
        for index, h_i in enumerate(_by_projection(h, projections, dim=1)):
            if need_factors[2 * index + 1]:
                scale = projections[index].scale
                of_factors[2 * index + 1] = gradient_of_B(h_i, gradients[index], scale)
        del h
    if need_x or any(need_factors[::2]):
        u = rows.new_empty(rows.shape[0], joined.shape[0])
        parts = _by_projection(u, projections, dim=1)
        for projection, g, part in zip(projections, gradients, parts, strict=True):
            if projection.lora_B is not None:
                torch.mm(g, projection.lora_B.to(rows.dtype), out=part)
                part.mul_(projection.scale)
    if u is not None and any(need_factors[::2]):
        of_A = _by_projection(u.t() @ rows, projections, dim=0)
        of_factors[::2] = [
            part if need else None for part, need in zip(of_A, need_factors[::2], strict=True)
        ]
    if not need_x:
        return None, of_factors
    assert u is not None
    grad_rows = frozen_input_gradient(projections[0].base, gradients.pop(0))
    for projection in projections[1:]:
        frozen_input_gradient(projection.base, gradients.pop(0), grad_rows)
    return grad_rows.addmm_(u, joined), of_factors


def _one_by_one(projections: Sequence[Projection]) -> bool:
    """Whether there is nothing to join."""
    if any(projection.dropout for projection in projections):
        return True
    return len(projections) == 1 or not any(projection.rank for projection in projections)


def _joined_A(projections: Sequence[Projection], dtype: torch.dtype) -> Tensor:
    """All A, one after another: (R, in)."""
    return torch.cat([p.lora_A.to(dtype) for p in projections if p.lora_A is not None])


def _by_projection(joined: Tensor, projections: Sequence[Projection], dim: int) -> Sequence[Tensor]:
    """Parts of what is joined along `dim`; empty where a projection has no factors."""
    return joined.split([projection.rank for projection in projections], dim)


def _gradients_one_by_one(
    gradients: list[Tensor],
    rows: Tensor,
    projections: Sequence[Projection],
    needed: Sequence[bool],
    tile: int,
) -> tuple[Tensor | None, list[Tensor | None]]:
    need_x, *need_factors = needed
    grad_rows: Tensor | None = None
    of_factors: list[Tensor | None] = []
    for index, projection in enumerate(projections):
        wanted = (need_x, *need_factors[2 * index : 2 * index + 2])
        part, *of_projection = projection.backward(gradients.pop(0), rows, tile, wanted)
        of_factors += of_projection
        if part is not None:
            grad_rows = part if grad_rows is None else grad_rows.add_(part)
        del part
    return grad_rows, of_factors


class _Project(torch.autograd.Function):
    """`project` with its gradients; saves `x` and the factors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, projections: tuple[Projection, ...], *factors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *factors)
        ctx.projections = projections
        projected = project(x.reshape(-1, x.shape[-1]), projections)
        return tuple(as_output(y, (*x.shape[:-1], y.shape[-1])) for y in projected)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        need_x, _, *need_factors = ctx.needs_input_grad
        x, *factors = ctx.saved_tensors
        gradients = [g.reshape(-1, g.shape[-1]) for g in grads]
        rows = x.reshape(-1, x.shape[-1])
        grad_rows, of_factors = projection_gradients(
            gradients, rows, ctx.projections, (need_x, *need_factors)
        )
        of_x = None if grad_rows is None else grad_rows.view(x.shape)
        return of_x, None, *as_factors(of_factors, factors)


def project_together(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """(..., in) -> (..., out_i) for each, recording gradients."""
    factors = [factor for projection in projections for factor in projection.factors]
    drawn = tuple(projection.drawn() for projection in projections)
    projected: tuple[Tensor, ...] = _Project.apply(x, drawn, *factors)
    return projected
