"""The loss's chunk from the memory left: the largest that fits, and the least where none is."""

from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig

from qlora_trainer.base.spec import BaseSpec
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.memory.foresight import SimulatedRun, simulate_run
from qlora_trainer.memory.gpus import GpuProfile, read_gpu
from qlora_trainer.memory.loss_chunk import MOST_TOKENS, with_loss_chunk
from qlora_trainer.memory.program import RunShape

VOCABULARY = 32_000
SHAPE = RunShape(base=BaseSpec("nf4"), adapter=AdapterSpec(rank=8, alpha=16), seq_len=4096)


def config(**values: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 512, "intermediate_size": 4096,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    return LlamaConfig(**sizes | values)


@pytest.fixture(scope="module")
def gpu() -> GpuProfile:
    return read_gpu("rtx-3090-24gb")


@pytest.fixture(scope="module")
def least(gpu: GpuProfile) -> SimulatedRun:
    return simulate_run(config(), SHAPE, gpu)


@pytest.fixture(scope="module")
def needed(gpu: GpuProfile) -> dict[int, int]:
    """Chunk -> bytes of the card."""
    return {
        tokens: simulate_run(config(), replace(SHAPE, loss_chunk_tokens=tokens), gpu)
        .on(gpu)
        .total_bytes
        for tokens in (1024, 2048)
    }


def test_the_largest_chunk_is_taken_that_fits(
    least: SimulatedRun, gpu: GpuProfile, needed: dict[int, int]
) -> None:
    assert least.on(gpu).total_bytes < needed[1024] < needed[2048]
    for tokens, size in needed.items():
        chosen = with_loss_chunk(config(), least, gpu, budget_bytes=size)
        found = chosen.on(gpu, budget_bytes=size)
        assert found.fits_without_retry
        assert chosen.shape.loss_chunk_tokens == found.loss_chunk_tokens == tokens
        largest = max(
            a.size_bytes for a in chosen.trace.log.allocations if a.component == "logits and loss"
        )
        assert largest == 4 * VOCABULARY * tokens
    assert with_loss_chunk(config(), least, gpu).shape.loss_chunk_tokens == MOST_TOKENS


def test_the_least_stays_where_nothing_is_left(gpu: GpuProfile) -> None:
    """Where little stands but the logits, they are the peak themselves."""
    small = config(hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    run = simulate_run(small, replace(SHAPE, seq_len=1024), gpu)
    budget = run.on(gpu).total_bytes
    assert with_loss_chunk(small, run, gpu, budget_bytes=budget) is run
    assert with_loss_chunk(small, run, gpu, budget_bytes=budget // 2) is run  # it does not fit


def test_no_more_tokens_than_there_are(gpu: GpuProfile) -> None:
    wide = config(vocab_size=131_072)  # the least chunk is 128 tokens
    run = simulate_run(wide, replace(SHAPE, seq_len=100), gpu)
    assert with_loss_chunk(wide, run, gpu) is run


def test_what_is_set_and_a_loss_without_chunks_are_left_alone(gpu: GpuProfile) -> None:
    short = replace(SHAPE, seq_len=1024)
    of_labels = replace(short, task="sequence-classification", task_settings={"labels": 2})
    for shape in (replace(short, loss_chunk_tokens=64), of_labels):
        run = simulate_run(config(), shape, gpu)
        assert with_loss_chunk(config(), run, gpu) is run


def test_segments_that_expand_leave_room_for_a_larger_chunk(
    least: SimulatedRun, gpu: GpuProfile
) -> None:
    shape = replace(SHAPE, loss_chunk_tokens=1024)
    size = simulate_run(config(), shape, gpu).on(gpu, expandable_segments=True).total_bytes
    larger = with_loss_chunk(config(), least, gpu, budget_bytes=size, expandable_segments=True)
    assert larger.shape == shape
    assert with_loss_chunk(config(), least, gpu, budget_bytes=size).shape != shape
