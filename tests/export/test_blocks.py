"""Block-wise sums are the plain sums, and what the cast did is measured as it is."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.export import blocks
from qlora_trainer.export.adapter import LowRank
from qlora_trainer.export.blocks import Buffers, CastLoss, merge_rows, row_step
from qlora_trainer.export.checkpoint import MappedCheckpoint
from qlora_trainer.export.rows import Quantization, rows_seen_in_training
from qlora_trainer.export.shards import Announced, ShardWriter
from qlora_trainer.lora.merge import merged_weight


def draw(kind: str, rows: int, columns: int, rank: int, seed: int) -> tuple[torch.Tensor, LowRank]:
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "linear": ((rows, columns), (rank, columns), (rows, rank)),
        "conv1d": ((rows, columns), (rank, rows), (columns, rank)),
        "embedding": ((rows, columns), (rank, rows), (columns, rank)),
        "conv2d": ((rows, columns, 3, 2), (rank, columns, 3, 2), (rows, rank, 1, 1)),
    }
    weight, a, b = (torch.randn(shape, generator=g) for shape in shapes[kind])
    return weight, LowRank(a, b, 0.7, kind)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["linear", "conv1d", "embedding", "conv2d"]), st.integers(1, 40),
       st.integers(1, 20), st.integers(1, 6), st.integers(1, 50), st.integers(0, 9))  # fmt: skip
def test_blocks_of_any_size_make_the_plain_sum(kind, rows, columns, rank, step, seed):
    weight, update = draw(kind, rows, columns, rank, seed)
    loss = CastLoss()
    buffers, made = Buffers(), []
    with mock.patch.object(blocks, "BLOCK_ELEMENTS", 2 * columns):
        for start in range(0, rows, step):
            part = weight[start : start + step]
            made.append(
                merge_rows(
                    part, update.factors(), torch.float32, loss, buffers, start=start
                ).clone()
            )
    found = torch.cat(made)
    expected = merged_weight(weight, update.lora_A, update.lora_B, update.scale, kind)
    assert torch.allclose(found, expected, atol=1e-5)
    assert loss.changed
    dense = merged_weight(torch.zeros_like(weight), update.lora_A, update.lora_B, 0.7, kind)
    assert update.norm() == pytest.approx(float(dense.norm()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cast_error_is_the_distance_between_sum_and_written_values(dtype):
    weight, update = draw("linear", 64, 48, 4, 0)
    loss = CastLoss()
    written = merge_rows(weight, update.factors(), dtype, loss, Buffers())
    exact = merged_weight(weight, update.lora_A, update.lora_B, update.scale, "linear")
    assert written.dtype == dtype
    assert math.sqrt(loss.squared_error) == pytest.approx(
        float((exact - written.float()).norm()), rel=1e-3
    )


def test_update_lost_in_rounding_is_noticed():
    weight = torch.ones(4, 4, dtype=torch.bfloat16)
    update = LowRank(torch.full((1, 4), 1e-3), torch.full((4, 1), 1e-3), 1.0, "linear")
    loss = CastLoss()
    merge_rows(weight, update.factors(), torch.bfloat16, loss, Buffers())
    assert not loss.changed


def test_overflow_and_bad_values_are_counted_apart():
    weight = torch.tensor([[1e5, 2e5, 1.0], [float("nan"), float("inf"), -3e5]])
    loss = CastLoss()
    merge_rows(weight, None, torch.float16, loss, Buffers())
    assert (loss.overflows, loss.not_finite) == (3, 2)
    assert loss.largest == pytest.approx(3e5)


@pytest.mark.parametrize("columns", [64, 96, 70, 33])
@pytest.mark.parametrize("double_quant", [True, False])
def test_weight_dequantized_in_blocks_equals_it_whole(columns, double_quant, monkeypatch):
    from qlora_trainer.base.nf4 import NF4Linear

    torch.manual_seed(0)
    weight = torch.randn(130, columns).bfloat16()
    layer = NF4Linear.quantize(
        weight, None, compute_dtype=torch.float32, device=torch.device("cpu"),
        double_quant=double_quant,
    )  # fmt: skip
    for elements in (2**20, 4096):
        monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", elements)
        rows = rows_seen_in_training(weight, Quantization(64, double_quant), transposed=False)
        starts = range(0, rows.count, rows.step)
        blocks_of = [rows.between(at, min(at + rows.step, rows.count)) for at in starts]
        assert elements > 4096 or len(blocks_of) > 1
        assert torch.equal(torch.cat(blocks_of), layer.dense_weight())


@given(st.integers(1, 5000), st.sampled_from([1, 64, 128, 4096]))
def test_a_block_holds_whole_quantization_blocks(columns, multiple):
    step = row_step((10, columns), multiple)
    assert step >= 1
    assert step * columns % multiple == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=8),
       st.integers(1, 200))  # fmt: skip
def test_shards_hold_what_was_written_and_no_more_than_their_size(tmp_path_factory, shapes, most):
    folder = tmp_path_factory.mktemp("shards")
    (folder / "config.json").write_text("{}")
    tensors = {f"t{n}": torch.randn(shape) for n, shape in enumerate(shapes)}
    announced = [Announced(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    with ShardWriter(folder, announced, most) as writer:
        for name, tensor in tensors.items():
            rows = list(enumerate(tensor))
            for number, row in reversed(rows):  # in any order
                writer.write(name, number * row.nbytes, row)
    read = MappedCheckpoint(folder)
    assert list(read.tensors) == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(read.view(read.tensors[name]), tensor)
    for file in folder.glob("*.safetensors"):
        inside = [t for t in read.tensors.values() if t.file == file]
        assert len([t for t in inside if t.stop > t.start]) <= 1 or (
            sum(t.stop - t.start for t in inside) <= most
        )


def test_shard_with_missing_bytes_is_never_closed_as_whole(tmp_path):
    announced = [Announced("a", torch.float32, (2,)), Announced("b", torch.float32, (1,))]
    writer = ShardWriter(tmp_path, announced, 4).__enter__()
    writer.write("a", 0, torch.zeros(1))
    writer.write("b", 0, torch.zeros(1))
    with pytest.raises(ValueError, match="'a': 4 bytes are missing"):
        writer.__exit__(None)
    assert not (tmp_path / "model.safetensors.index.json").exists()
