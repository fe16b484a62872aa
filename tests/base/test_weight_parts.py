"""A weight that comes in parts multiplies as the whole one, and is never there as a whole."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_trainer.base import weight_parts as module
from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.base.weight_parts import (
    dense_rows,
    frozen_input_gradient,
    frozen_product,
    row_parts,
    row_unit,
)

CPU = torch.device("cpu")
ROWS, COLUMNS = 1100, 96  # rows of 96 begin where blocks of 64 do at every second one

ROUNDED = {"rtol": 1e-5, "atol": 1e-4}  # sums of a thousand terms, in another order


def layer_of(
    *, double_quant: bool = True, bias: bool = False, dtype: torch.dtype = torch.float32
) -> NF4Linear:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    added = torch.randn(ROWS, generator=generator) if bias else None
    return NF4Linear.quantize(
        weight, added, compute_dtype=dtype, device=CPU, double_quant=double_quant
    )


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 4 * COLUMNS * 600)  # of 512 rows where scales nest


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.usefixtures("small_parts")
def test_products_are_those_with_the_whole_weight(double_quant: bool, bias: bool) -> None:
    layer = layer_of(double_quant=double_quant, bias=bias)
    parts = row_parts(layer, torch.float32)
    assert parts is not None
    assert len([*parts]) > 1
    x, g = torch.randn(7, COLUMNS), torch.randn(7, ROWS)
    weight = layer.dense_weight()
    torch.testing.assert_close(
        frozen_product(layer, x), torch.nn.functional.linear(x, weight, layer.bias)
    )
    torch.testing.assert_close(frozen_input_gradient(layer, g), g @ weight, **ROUNDED)
    held = torch.randn(7, COLUMNS)
    expected = held + g @ weight
    assert frozen_input_gradient(layer, g, held) is held
    torch.testing.assert_close(held, expected, **ROUNDED)


@pytest.mark.parametrize("double_quant", [False, True])
def test_rows_are_bit_for_bit_those_of_the_whole_weight(double_quant: bool) -> None:
    layer = layer_of(double_quant=double_quant)
    first = row_unit(layer)
    rows = dense_rows(layer, first, 1001, torch.float32)
    assert torch.equal(rows, layer.dense_weight()[first:1001])


@pytest.mark.usefixtures("small_parts")
def test_the_whole_weight_is_never_there() -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.is_floating_point():
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    layer = layer_of()
    x = torch.randn(2, COLUMNS, requires_grad=True)
    with Watch():
        layer(x).sum().backward()
    assert 4 * COLUMNS * 512 <= largest <= module.PART_BYTES < 4 * COLUMNS * ROWS
    assert x.grad is not None
    expected = layer.dense_weight().sum(0).expand(2, -1)
    torch.testing.assert_close(x.grad, expected, **ROUNDED)


@pytest.mark.usefixtures("small_parts")
def test_16_bit_weights_and_dense_ones_come_whole() -> None:
    layer = layer_of(dtype=torch.bfloat16)
    assert row_parts(layer, torch.bfloat16) is None  # a sum over parts would be rounded once a part
    assert row_parts(torch.nn.Linear(COLUMNS, ROWS), torch.float32) is None
    x = torch.randn(3, COLUMNS).bfloat16()
    assert torch.equal(frozen_product(layer, x), x @ layer.dense_weight().t())


def test_a_weight_of_usual_size_comes_whole() -> None:
    assert row_parts(layer_of(), torch.float32) is None
    elsewhere = NF4Linear.empty(
        4096, 14336, bias=False, compute_dtype=torch.float32, device=torch.device("meta")
    )
    assert row_parts(elsewhere, torch.float32) is None  # a GPU's allocator keeps memory
    elsewhere.on_cpu = True  # a weightless one that stands for a CPU's
    assert row_parts(elsewhere, torch.float32) is not None
