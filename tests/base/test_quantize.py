"""Claims of base/quantize.py: the codes are bitsandbytes' own, whatever the shape or dtype."""

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.base.quantize import (
    BLOCK_SIZES,
    _bitsandbytes_blocks,
    _quantize_blocks,
    dequantize_absmax,
    dequantize_nf4,
    empty_nf4,
    quantize_nf4,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Whole blocks, a short last block, odd rows, odd totals, less than a block, several pieces.
SHAPES = ((64, 96), (7, 13), (1, 5), (1, 1), (33, 64), (200, 300), (520, 1030))


def random_weight(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_equal_bitsandbytes_bit_for_bit(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = random_weight(shape, dtype)
    codes, state = bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    ours = quantize_nf4(weight)
    assert torch.equal(ours.codes, codes.view(-1))
    assert torch.equal(ours.absmax, state.absmax)
    assert ours.absmax_scale is not None
    assert ours.absmax_code is not None
    assert ours.absmax_offset is not None
    assert torch.equal(ours.absmax_scale, state.state2.absmax)
    assert torch.equal(ours.absmax_code, state.state2.code)
    assert torch.equal(ours.absmax_offset, state.offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(64, 128), (33, 64), (200, 320)])
def test_rebuilt_weight_equals_bitsandbytes_bit_for_bit(
    shape: tuple[int, int], double_quant: bool, dtype: torch.dtype
) -> None:
    weight = random_weight(shape, dtype)
    codes, state = bnb.quantize_4bit(weight, compress_statistics=double_quant, quant_type="nf4")
    ours = quantize_nf4(weight, double_quant=double_quant)
    assert torch.equal(dequantize_nf4(ours, shape, 64, dtype), bnb.dequantize_4bit(codes, state))


def hard_weight(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Random values among which whole blocks are zero, or very small or very large."""
    flat = random_weight(shape, torch.float32).to(dtype).view(-1)
    kind = (torch.arange(flat.numel()) // 64) % 5
    limits = torch.finfo(dtype)
    flat[kind == 1] = 0
    flat[kind == 2] *= 1024 * limits.smallest_normal  # avx512_bf16 flushes what is smaller
    flat[kind == 3] = (flat[kind == 3].float().clamp(-1, 1) * min(limits.max / 2, 1e30)).to(dtype)
    flat[kind == 4] = -flat[kind == 4].abs()
    return flat.view(shape)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_codes_scales_and_values_equal_bitsandbytes_everywhere(
    block_size: int, double_quant: bool
) -> None:
    """All shapes and dtypes; values by bitsandbytes' reference (its `backends/default/ops.py`).

    Its CPU kernel is asked as well where it is right: rows of whole blocks.
    """
    table = bnb.get_4bit_type("nf4", "cpu")
    for shape in (*SHAPES, (3, 1120), (4, block_size)):
        for dtype in DTYPES:
            weight = hard_weight(shape, dtype)
            codes, state = bnb.quantize_4bit(
                weight, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
            )
            ours = quantize_nf4(weight, block_size=block_size, double_quant=double_quant)
            assert torch.equal(ours.codes, codes.view(-1)), (shape, dtype)
            assert torch.equal(ours.absmax, state.absmax), (shape, dtype)
            numbers = torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], dim=1).view(-1)
            scales = state.absmax
            if double_quant:
                scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
            scales = scales.float().repeat_interleave(block_size)[: weight.numel()]
            expected = (table[numbers.long()][: weight.numel()] * scales).view(shape).to(dtype)
            found = dequantize_nf4(ours, shape, block_size, dtype)
            assert torch.equal(found, expected), (shape, dtype)
            if shape[1] % block_size == 0:
                assert torch.equal(found, bnb.dequantize_4bit(codes, state)), (shape, dtype)


@pytest.mark.parametrize("block_size", [32, 64, 512])
@pytest.mark.parametrize("shape", [*SHAPES, (64, 32), (8, 160), (3, 1120)])
def test_rebuilt_weight_equals_the_formula_written_out(
    shape: tuple[int, int], block_size: int
) -> None:
    """Also where bitsandbytes' CPU kernel goes wrong: rows that are not whole blocks."""
    weight = random_weight(shape, torch.float32)
    ours = quantize_nf4(weight, block_size=block_size)
    values = bnb.get_4bit_type("nf4", "cpu")
    codes = torch.stack([ours.codes >> 4, ours.codes & 15], dim=1).view(-1)[: weight.numel()]
    scales = dequantize_absmax(ours).repeat_interleave(block_size)[: weight.numel()]
    expected = (values[codes.long()] * scales).view(shape)
    for dtype in DTYPES:
        assert torch.equal(dequantize_nf4(ours, shape, block_size, dtype), expected.to(dtype))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size_equals_bitsandbytes(block_size: int) -> None:
    weight = random_weight((96, 1100), torch.bfloat16)
    codes, state = bnb.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=False, quant_type="nf4"
    )
    ours = quantize_nf4(weight, block_size=block_size, double_quant=False)
    assert torch.equal(ours.codes, codes.view(-1))
    assert torch.equal(ours.absmax, state.absmax)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    weight = random_weight((1000, 1001), dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(_quantize_blocks(weight, 64))
    finally:
        torch.set_num_threads(before)
    expected = _bitsandbytes_blocks(weight.reshape(-1), 64)
    for codes, absmax in results:
        assert torch.equal(codes, expected[0])
        assert torch.equal(absmax, expected[1])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.floats(-(2.0**100), 2.0**100, width=32, allow_nan=False),
            st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-38, 3.4e38, 1.0, -1.0]),
        ),
        min_size=1,
        max_size=400,
    )
)
def test_our_pieces_agree_with_bitsandbytes_on_any_values(values: list[float]) -> None:
    flat = torch.tensor(values, dtype=torch.float32)
    codes, absmax = _quantize_blocks(flat, 64)
    expected_codes, expected_absmax = _bitsandbytes_blocks(flat, 64)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(absmax, expected_absmax)


def test_values_on_a_midpoint_fall_where_bitsandbytes_puts_them() -> None:
    values = bnb.get_4bit_type("nf4", "cpu")
    midpoints = (values[1:] + values[:-1]) / 2
    around = torch.cat(
        [midpoints, midpoints.nextafter(torch.tensor(2.0)), midpoints.nextafter(torch.tensor(-2.0))]
    )
    flat = torch.cat([torch.ones(1), around, torch.zeros(64)])[:64].contiguous()
    assert torch.equal(_quantize_blocks(flat, 64)[0], _bitsandbytes_blocks(flat, 64)[0])


def test_weights_of_zeros_come_back_as_zeros() -> None:
    ours = quantize_nf4(torch.zeros(64, 64), double_quant=False)
    assert torch.equal(dequantize_nf4(ours, (64, 64), 64, torch.float32), torch.zeros(64, 64))


def test_a_transposed_view_is_quantized_in_its_own_order() -> None:
    weight = random_weight((96, 64), torch.float32)
    assert torch.equal(quantize_nf4(weight.t()).codes, quantize_nf4(weight.t().contiguous()).codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(broken: float, dtype: torch.dtype) -> None:
    weight = random_weight((64, 64), dtype)
    weight[3, 5] = broken
    with pytest.raises(ValueError, match="not finite"):
        quantize_nf4(weight)


def test_unknown_dtype_and_block_size_are_refused() -> None:
    with pytest.raises(ValueError, match="cast to float32"):
        quantize_nf4(torch.zeros(4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="block_size = 100"):
        quantize_nf4(torch.zeros(4, 4), block_size=100)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(7, 13), (64, 96), (300, 701)])
def test_empty_tensors_have_the_shapes_of_real_ones(
    shape: tuple[int, int], double_quant: bool
) -> None:
    real = quantize_nf4(random_weight(shape, torch.float32), double_quant=double_quant)
    empty = empty_nf4(
        shape[0] * shape[1], block_size=64, double_quant=double_quant, device=torch.device("meta")
    )
    for name in ("codes", "absmax", "absmax_scale", "absmax_code", "absmax_offset"):
        ours, theirs = getattr(empty, name), getattr(real, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_quantizing_without_weights_gives_the_same_shapes() -> None:
    weight = random_weight((48, 80), torch.bfloat16)
    real, weightless = quantize_nf4(weight), quantize_nf4(weight.to("meta"))
    assert weightless.codes.shape == real.codes.shape
    assert weightless.absmax.shape == real.absmax.shape
    assert weightless.codes.is_meta
