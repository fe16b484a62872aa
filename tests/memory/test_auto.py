"""The plan found fits, and the next faster one does not."""

import dataclasses

import pytest
from transformers import LlamaConfig

from qlora_trainer.base.spec import BaseSpec
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.memory.auto import choose_activations, plans
from qlora_trainer.memory.foresight import simulate_run
from qlora_trainer.memory.gpus import read_gpu
from qlora_trainer.memory.program import RunShape

LAYERS = 3
CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192,
)  # fmt: skip
SHAPE = RunShape(
    base=BaseSpec("nf4"), adapter=AdapterSpec(rank=8, alpha=16), seq_len=8192, loss_chunk_tokens=64
)


@pytest.fixture(scope="module")
def gpu():
    return read_gpu("rtx-3090-24gb")


@pytest.fixture(scope="module")
def needed(gpu):
    """Bytes of the card that each plan takes."""
    shapes = [dataclasses.replace(SHAPE, activations=plan) for plan in plans(LAYERS)]
    return [simulate_run(CONFIG, shape, gpu).on(gpu).total_bytes for shape in shapes]


def test_plans_stand_in_the_order_of_their_memory(needed) -> None:
    assert len(needed) == 2 * LAYERS
    assert needed == sorted(needed)
    assert needed[-1] > 1.2 * needed[0]


@pytest.mark.parametrize("index", [LAYERS + 1])
def test_the_fastest_plan_that_fits_is_chosen(needed, gpu, index: int) -> None:
    last = max(i for i, size in enumerate(needed) if size <= needed[index])
    assert choose_activations(CONFIG, SHAPE, gpu, needed[index]) == plans(LAYERS)[last]


def test_just_so_many_layers_are_offloaded_as_the_budget_asks_for(gpu) -> None:
    layers = 6  # more than the two whose inputs are on their way
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=1024, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip
    shape = dataclasses.replace(SHAPE, seq_len=4096)

    def needs(plan: tuple[str, ...]) -> int:
        found = simulate_run(config, dataclasses.replace(shape, activations=plan), gpu).on(gpu)
        return found.total_bytes

    one, none = ("offload", *["recompute"] * (layers - 1)), ("recompute",) * layers
    assert needs(one) < needs(none)
    assert choose_activations(config, shape, gpu, needs(none)) == none
    assert choose_activations(config, shape, gpu, needs(none) - 1) == one


def test_where_nothing_fits_the_smallest_plan_is_named(gpu) -> None:
    assert choose_activations(CONFIG, SHAPE, gpu, gpu.context_bytes + 2**20) == plans(LAYERS)[0]


def test_a_cpu_has_a_budget_too() -> None:
    kept = dataclasses.replace(SHAPE, activations="keep")
    size = simulate_run(CONFIG, kept, None).trace.live().peak_bytes
    assert choose_activations(CONFIG, SHAPE, None, size) == ("keep",) * LAYERS
    assert choose_activations(CONFIG, SHAPE, None, size - 1) != ("keep",) * LAYERS


def test_segments_that_expand_leave_room_for_a_faster_plan(gpu) -> None:
    kept = simulate_run(CONFIG, dataclasses.replace(SHAPE, activations="keep"), gpu)
    size = kept.on(gpu, expandable_segments=True).total_bytes
    assert size < kept.on(gpu).total_bytes
    chosen = choose_activations(CONFIG, SHAPE, gpu, size, expandable_segments=True)
    assert chosen == ("keep",) * LAYERS != choose_activations(CONFIG, SHAPE, gpu, size)
