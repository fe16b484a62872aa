"""The C functions give the operators' bits, and nothing is handed to them that they cannot read."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_trainer.base.bitsandbytes_cpu import (
    _blockwise_example,
    _checked,
    _nf4_example,
    dequantize_blockwise,
    dequantize_nf4_blocks,
)
from qlora_trainer.base.quantize import dequantize_nf4, quantize_nf4
from qlora_trainer.memory.tracker import AllocationTracker

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def four_bits(blocks: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Random codes and scales."""
    random = torch.Generator().manual_seed(blocks * block_size)
    codes = torch.randint(256, (blocks * block_size // 2,), generator=random, dtype=torch.uint8)
    return codes, torch.rand(blocks, generator=random) * 3


def eight_bits(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes, scales and code book."""
    random = torch.Generator().manual_seed(count)
    codes = torch.randint(256, (count,), generator=random, dtype=torch.uint8)
    blocks = -(-count // 256)
    return codes, torch.rand(blocks, generator=random), torch.randn(256, generator=random)


def operator(codes: Tensor, absmax: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """4 bits as bitsandbytes' operator reads them."""
    shape = (absmax.numel(), block_size)
    read: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        codes, absmax, block_size, "nf4", shape, dtype
    )
    return read


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("blocks", [1, 7, 300])
def test_four_bits_are_the_operators(blocks: int, block_size: int, dtype: torch.dtype) -> None:
    codes, absmax = four_bits(blocks, block_size)
    found = dequantize_nf4_blocks(codes, absmax, block_size, blocks, dtype)
    assert found is not None
    assert torch.equal(found, operator(codes, absmax, block_size, dtype))


@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_eight_bits_are_the_operators(count: int) -> None:
    codes, absmax, book = eight_bits(count)
    found = dequantize_blockwise(codes, absmax, book, 256)
    assert found is not None
    expected = torch.ops.bitsandbytes.dequantize_blockwise.default(
        codes, absmax, book, 256, torch.float32
    )
    assert torch.equal(found, expected)


def test_a_slice_is_read_from_where_it_begins() -> None:
    codes, absmax = four_bits(12, 64)
    found = dequantize_nf4_blocks(codes[128:256], absmax[4:8], 64, 4, torch.float32)
    assert found is not None
    assert torch.equal(found, operator(codes, absmax, 64, torch.float32)[4:8])


@pytest.mark.parametrize("block_size", [63, 2048, 4096])
def test_block_sizes_of_another_implementation_are_the_operators(block_size: int) -> None:
    codes, absmax = four_bits(4, block_size)
    assert dequantize_nf4_blocks(codes, absmax, block_size, 4, torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_other_dtypes_are_the_operators(dtype: torch.dtype) -> None:
    assert dequantize_nf4_blocks(*four_bits(4, 64), 64, 4, dtype) is None


def test_tensors_that_no_address_stands_for_are_the_operators() -> None:
    codes, absmax = four_bits(4, 64)
    eight, scales, book = eight_bits(512)
    for given in (
        (codes.repeat_interleave(2)[::2], absmax),
        (codes, absmax.repeat_interleave(2)[::2]),
        (codes.view(torch.int8), absmax),
        (codes, absmax.bfloat16()),
        (codes.to("meta"), absmax.to("meta")),
        (torch.nn.Parameter(codes, requires_grad=False), absmax),
    ):
        assert dequantize_nf4_blocks(*given, 64, 4, torch.float32) is None
    for three in (
        (eight.repeat_interleave(2)[::2], scales, book),
        (eight, scales.double(), book),
        (eight, scales, book.half()),
        (eight.to("meta"), scales.to("meta"), book.to("meta")),
    ):
        assert dequantize_blockwise(*three, 256) is None
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in (codes, absmax, eight, scales, book)]
        assert dequantize_nf4_blocks(fake[0], fake[1], 64, 4, torch.float32) is None
        assert dequantize_blockwise(fake[2], fake[3], fake[4], 256) is None


def test_nothing_is_read_beyond_what_is_there() -> None:
    codes, absmax = four_bits(4, 64)
    assert dequantize_nf4_blocks(codes[:-1], absmax, 64, 4, torch.float32) is None
    assert dequantize_nf4_blocks(codes, absmax[:-1], 64, 4, torch.float32) is None
    eight, scales, book = eight_bits(512)
    assert dequantize_blockwise(eight, scales[:-1], book, 256) is None
    assert dequantize_blockwise(eight, scales, book[:-1], 256) is None


def test_the_result_is_on_the_cpu_wherever_new_tensors_are() -> None:
    codes, absmax = four_bits(4, 64)
    eight, scales, book = eight_bits(512)
    _checked.cache_clear()
    with torch.device("meta"):  # an address on it is 0
        four = dequantize_nf4_blocks(codes, absmax, 64, 4, torch.float32)
        wide = dequantize_blockwise(eight, scales, book, 256)
    assert four is not None
    assert wide is not None
    assert four.device.type == wide.device.type == "cpu"
    assert torch.equal(four, operator(codes, absmax, 64, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_of_other_bits_is_refused(dtype: torch.dtype) -> None:
    def of_nothing(*_addresses_and_counts: int) -> None:
        """Leaves the result as it came."""

    def nearly(*given: int) -> None:
        """As the kernel does it, of other scales."""
        kernel = _checked("nf4", dtype)
        assert kernel is not None
        kernel(given[0], given[1] + 4, given[2], given[3], given[4] - 1, given[5])

    right = _checked("nf4", dtype)
    assert right is not None
    assert _nf4_example(right, dtype)
    assert not _nf4_example(nearly, dtype)
    assert not _nf4_example(of_nothing, dtype)
    assert not _blockwise_example(of_nothing, dtype)


def test_a_kernel_that_is_not_there_is_none() -> None:
    assert _checked("nf4", torch.float64) is None


@pytest.mark.parametrize("shape", [(64, 96), (7, 13), (1, 5), (3, 1120)])
def test_doubles_are_the_floats(shape: tuple[int, int]) -> None:
    """The operator, asked for them, hands out memory nobody has written."""
    held = quantize_nf4(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    found = dequantize_nf4(held, shape, 64, torch.float64)
    assert found.dtype == torch.float64
    assert torch.equal(found, dequantize_nf4(held, shape, 64, torch.float32).double())


def test_a_weight_rebuilt_is_booked_as_one() -> None:
    held = quantize_nf4(torch.randn(64, 96), double_quant=True)
    tracker = AllocationTracker("cpu")
    with tracker:
        dequantize_nf4(held, (64, 96), 64, torch.bfloat16)
    booked = [(a.size_bytes, a.component) for a in tracker.log.allocations]
    assert booked == [(96 * 4, "dequantized weights"), (64 * 96 * 2, "dequantized weights")]


def test_a_compiler_sees_the_operators() -> None:
    held = quantize_nf4(torch.randn(64, 96, generator=torch.Generator().manual_seed(1)))
    seen: list[str] = []

    def note(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def rebuilt(codes: Tensor) -> Tensor:
        parts = type(held)(
            codes, held.absmax, held.absmax_scale, held.absmax_code, held.absmax_offset
        )
        return dequantize_nf4(parts, (64, 96), 64, torch.float32)

    torch.compiler.reset()
    compiled = torch.compile(rebuilt, backend=note, fullgraph=True)
    assert torch.equal(compiled(held.codes), rebuilt(held.codes))
    assert {"bitsandbytes.dequantize_4bit.default", "bitsandbytes.dequantize_blockwise.default"} < (
        set(seen)
    )
    torch.compiler.reset()
