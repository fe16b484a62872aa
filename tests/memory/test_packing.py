"""Packed rows are foreseen as they run: with a mask of T x T, or without and like one sequence."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from qlora_trainer.base.spec import BaseSpec
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.memory.foresight import Foresight, SimulatedRun, simulate_run
from qlora_trainer.memory.full_batch import full_batch, held_out_batch
from qlora_trainer.memory.gpus import GpuProfile, read_gpu
from qlora_trainer.memory.measure import without_evaluation
from qlora_trainer.memory.program import RunShape
from tests.memory.models import real_steps, run_shape, tiny_config

CONFIG = LlamaConfig(
    vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32_768,
)  # fmt: skip
SHAPE = RunShape(
    base=BaseSpec("nf4", compute_dtype=torch.float16),
    adapter=AdapterSpec(rank=8, alpha=16),
    seq_len=4096,
    loss_chunk_tokens=128,
    longest_held_out=0,
)
MASKED = {"packed": True, "mask_free": False}


@pytest.fixture(scope="module")
def ampere() -> GpuProfile:
    return read_gpu("rtx-3060-12gb")


def simulated(gpu: GpuProfile, **changes: object) -> SimulatedRun:
    return simulate_run(CONFIG, replace(SHAPE, **changes), gpu)


def peak(gpu: GpuProfile, **changes: object) -> int:
    return simulated(gpu, **changes).on(gpu).allocated_bytes


def kernels(found: Foresight) -> set[str]:
    return {name.removesuffix(", backward") for name in found.kernels if "attention" in name}


def test_packed_rows_without_a_mask_take_what_one_sequence_takes(ampere: GpuProfile) -> None:
    plain, packed = (simulated(ampere, packed=packed).on(ampere) for packed in (False, True))
    assert kernels(plain) == {"flash attention"}
    assert "variable-length flash attention" in kernels(packed)
    assert packed.allocated_bytes == pytest.approx(plain.allocated_bytes, rel=0.02)


def test_a_card_before_ampere_runs_examples_one_by_one() -> None:
    turing = read_gpu("rtx-2060-6gb")
    plain, packed = (simulated(turing, packed=packed).on(turing) for packed in (False, True))
    assert kernels(plain) == kernels(packed) == {"memory-efficient attention"}
    assert packed.allocated_bytes == pytest.approx(plain.allocated_bytes, rel=0.1)
    once, twice = (found.kernels["memory-efficient attention"] for found in (plain, packed))
    assert once < twice


@pytest.mark.parametrize("tokens", [4096, 8192])
def test_a_mask_takes_its_bytes_and_its_additive_copy(ampere: GpuProfile, tokens: int) -> None:
    free, masked = (
        simulated(ampere, seq_len=tokens, packed=True, mask_free=mask_free).on(ampere)
        for mask_free in (True, False)
    )
    assert "memory-efficient attention" in kernels(masked)
    of_mask = tokens**2 * (1 + 2)  # of truth values, and in 16 bit beside the scores
    more = masked.allocated_bytes - free.allocated_bytes
    assert more == pytest.approx(of_mask, rel=0.15)


def test_what_a_mask_costs_grows_with_the_square(ampere: GpuProfile) -> None:
    costs = [
        peak(ampere, seq_len=tokens, **MASKED) - peak(ampere, seq_len=tokens, packed=True)
        for tokens in (4096, 8192, 16_384)
    ]
    assert costs[2] / costs[1] == pytest.approx(4, rel=0.1)
    assert costs[1] / costs[0] == pytest.approx(4, rel=0.1)


def test_more_examples_cost_the_variable_length_kernel_rows(ampere: GpuProfile) -> None:
    workspaces = [
        max(a.size_bytes for a in run.trace.log.allocations if a.operator.endswith("dq_accum"))
        for run in (simulated(ampere, packed=True, examples=n) for n in (2, 34))
    ]
    assert workspaces[1] - workspaces[0] == 32 * 128 * CONFIG.hidden_size * 4


@pytest.mark.parametrize("mask_free", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_packed_step_is_foreseen_as_it_is_measured(mask_free: bool, rows: int) -> None:
    config = tiny_config("llama")
    shape = run_shape("none", "keep", torch.float32, packed=True, mask_free=mask_free,
                      micro_batch_size=rows, seq_len=160, examples=3)  # fmt: skip
    foreseen = without_evaluation(simulate_run(config, shape, None).trace).live()
    real = real_steps(config, shape)
    assert foreseen.peak_bytes == pytest.approx(real.allocated_bytes, rel=0.001)


def test_packed_rows_lie_as_the_run_lays_them() -> None:
    shape = replace(SHAPE, packed=True, micro_batch_size=2, seq_len=4, examples=2)
    rows = full_batch(shape, attention="sdpa")
    assert rows["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
    flat = full_batch(shape, attention="packed_sdpa")
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 0]]
    assert flat["input_ids"].shape == flat["labels"].shape == (1, 8)


def test_evaluation_is_of_single_examples() -> None:
    shape = replace(SHAPE, packed=True, micro_batch_size=2, seq_len=8, longest_held_out=5)
    evaluated = held_out_batch(shape)
    assert evaluated is not None
    assert evaluated["attention_mask"].shape == (2, 5)
    assert "position_ids" not in evaluated
    longest = held_out_batch(replace(shape, longest_held_out=None))
    assert longest is not None
    assert longest["input_ids"].shape == (2, 8)
    assert held_out_batch(replace(shape, longest_held_out=0)) is None
    assert held_out_batch(replace(shape, packed=False, padded=True, longest_held_out=None)) is None


@pytest.mark.parametrize("packed", [True, False])
def test_evaluation_has_its_own_number_of_rows(packed: bool) -> None:
    shape = replace(SHAPE, packed=packed, seq_len=8, longest_held_out=None, held_out_rows=3)
    evaluated = held_out_batch(shape)
    assert evaluated is not None
    assert evaluated["attention_mask"].shape == (3, 8)
    shorter = held_out_batch(replace(shape, longest_held_out=6))
    assert shorter is not None
    assert shorter["input_ids"].shape == (3, 6)
