"""Projections computed together are the separate ones, and save nothing but input and factors."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.lora.projections import Projection, project_together

WIDE, OUT = 64, (64, 32, 48)
RANKS: dict[str, tuple[int, ...]] = {
    "one rank": (4, 4, 4),
    "three ranks": (2, 8, 4),
    "one has no adapter": (4, 0, 4),
    "none has an adapter": (0, 0, 0),
}


def parts(
    ranks: Sequence[int], dtype: torch.dtype, *, nf4: bool = False, bias: bool = True
) -> tuple[list[nn.Module], list[torch.Tensor | None]]:
    """Frozen maps, and A and B of each or None."""
    torch.manual_seed(2)
    bases: list[nn.Module] = []
    factors: list[torch.Tensor | None] = []
    for rank, out in zip(ranks, OUT, strict=True):
        linear = nn.Linear(WIDE, out, bias=bias).to(dtype).requires_grad_(False)
        bases.append(
            NF4Linear.quantize(
                linear.weight, linear.bias, compute_dtype=dtype, device=torch.device("cpu")
            )
            if nf4
            else linear
        )
        shapes = ((rank, WIDE), (out, rank))
        factors += [
            (torch.randn(shape) / 8).to(dtype).requires_grad_() if rank else None
            for shape in shapes
        ]
    return bases, factors


def projections(
    bases: Sequence[nn.Module],
    factors: Sequence[torch.Tensor | None],
    scales: Sequence[float] = (0.5, 2.0, 0.7),
    dropout: float = 0.0,
) -> list[Projection]:
    pairs = zip(bases, factors[::2], factors[1::2], scales, strict=True)
    return [Projection(base, A, B, scale, dropout) for base, A, B, scale in pairs]


def gradients(
    x: torch.Tensor, factors: Sequence[torch.Tensor | None], outputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    total = sum(
        (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum()
        for y in outputs
    )
    wanted = [x, *(factor for factor in factors if factor is not None)]
    return list(torch.autograd.grad(total, wanted))


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_the_derivatives_in_float64(ranks: tuple[int, ...], dropout: float) -> None:
    bases, factors = parts(ranks, torch.float64)
    x = torch.randn(1, 3, WIDE, dtype=torch.float64, requires_grad=True)
    present = [factor for factor in factors if factor is not None]

    def function(x: torch.Tensor, *present: torch.Tensor) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(5)
        given = iter(present)
        placed = [None if factor is None else next(given) for factor in factors]
        return project_together(x, projections(bases, placed, dropout=dropout))

    assert torch.autograd.gradcheck(function, (x, *present), fast_mode=True)


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_together_on_nf4_is_no_further_from_the_truth_than_apart(ranks: tuple[int, ...]) -> None:
    bases, factors = parts(ranks, torch.bfloat16, nf4=True)
    x = torch.randn(2, 40, WIDE).bfloat16().requires_grad_()
    together = project_together(x, projections(bases, factors))
    found = [*together, *gradients(x, factors, together)]
    apart = [
        y for projection in projections(bases, factors) for y in project_together(x, [projection])
    ]
    separate = [*apart, *gradients(x, factors, apart)]
    exact_factors = [None if f is None else f.detach().double().requires_grad_() for f in factors]
    exact_x = x.detach().double().requires_grad_()
    truth = project_together(exact_x, projections(bases, exact_factors))
    expected = [*truth, *gradients(exact_x, exact_factors, truth)]
    for ours, other, exact in zip(found, separate, expected, strict=True):
        error = (ours.double() - exact).norm()
        assert error <= 1.1 * (other.double() - exact).norm() + 1e-3 * exact.norm()
        assert error <= 0.01 * exact.norm()


def test_only_what_is_needed_is_computed() -> None:
    bases, factors = parts((4, 4, 4), torch.float32)
    for index in (0, 3):  # A of the first, B of the second
        held = factors[index]
        assert held is not None
        factors[index] = held.detach()
    x = torch.randn(5, WIDE)  # needs no gradient: a first layer
    outputs = project_together(x, projections(bases, factors))
    torch.stack([y.sum() for y in outputs]).sum().backward()
    given = [factor is not None and factor.grad is not None for factor in factors]
    assert given == [False, True, True, False, True, True]


def test_only_the_input_and_the_factors_are_saved() -> None:
    bases, factors = parts((4, 4, 4), torch.bfloat16, nf4=True)
    x = torch.randn(1, 9, WIDE).bfloat16().requires_grad_()
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        project_together(x, projections(bases, factors))
    own = {factor.data_ptr() for factor in factors if factor is not None}
    assert {tensor.data_ptr() for tensor in saved} == own | {x.data_ptr()}


def test_runs_without_values_on_meta() -> None:
    bases, factors = parts((2, 8, 4), torch.float32)
    moved = [None if f is None else f.detach().to("meta").requires_grad_() for f in factors]
    x = torch.empty(1, 9, WIDE, device="meta", requires_grad=True)
    outputs = project_together(x, projections([base.to("meta") for base in bases], moved))
    assert [tuple(y.shape) for y in outputs] == [(1, 9, out) for out in OUT]
    torch.stack([y.sum() for y in outputs]).sum().backward()
    assert x.grad is not None
    assert all(f is not None and f.grad is not None and f.grad.shape == f.shape for f in moved)
