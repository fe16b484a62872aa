"""What the step holds with every technique on, as CUDA would run it: nothing grows with T but rows.

Flash attention's own backward workspace is fp32 and as large as the queries; that is its kernel's,
and the only exception.
"""

import dataclasses
from collections import Counter

import pytest
from transformers import LlamaConfig

from qlora_trainer.base.spec import BaseSpec
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.memory.foresight import simulate_run
from qlora_trainer.memory.gpus import read_gpu
from qlora_trainer.memory.log import EMPTY_CACHE
from qlora_trainer.memory.program import RunShape
from qlora_trainer.tasks.linear_cross_entropy import Regularized
from qlora_trainer.training.techniques import Techniques

TOKENS, WIDTH, LAYERS = 32_768, 256, 4
CONFIG = LlamaConfig(
    vocab_size=2048, hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=LAYERS,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=TOKENS,
    tie_word_embeddings=False,
)  # fmt: skip
RESIDUAL_BYTES = TOKENS * WIDTH * 2
LOOKED_UP_BYTES = TOKENS * 8 + RESIDUAL_BYTES  # ids go down, rows come up
PLAIN = RunShape(
    base=BaseSpec("nf4"),
    adapter=AdapterSpec(rank=8, alpha=16),
    seq_len=TOKENS,
    loss_chunk_tokens=128,
)
LONG = dataclasses.replace(
    PLAIN,
    base=BaseSpec("nf4", embeddings_on_host=True),
    activations="offload",
    techniques=Techniques(fused_mlp=True, mlp_tile_tokens=4096, tiled_norms=True, fused_qkv=True),
)


@pytest.fixture(scope="module")
def gpu():
    return read_gpu("rtx-3090-24gb")


@pytest.fixture(scope="module")
def long_run(gpu):
    return simulate_run(CONFIG, LONG, gpu)


@pytest.fixture(scope="module")
def streamed_run(gpu):
    base = dataclasses.replace(LONG.base, stream_layers=True)
    return simulate_run(CONFIG, dataclasses.replace(LONG, base=base), gpu)


def larger_than_the_residual(run):
    step = [a for a in run.trace.log.allocations if a.phase in ("forward", "backward")]
    return {
        (a.operator, a.size_bytes)
        for a in step
        if a.size_bytes > RESIDUAL_BYTES and not a.operator.startswith("flash backward")
    }


def test_no_fp32_residual_no_score_matrix_no_full_logits(long_run) -> None:
    assert larger_than_the_residual(long_run) == set()


def test_nor_with_packed_rows_a_small_head_and_streamed_layers(gpu) -> None:
    packed = simulate_run(CONFIG, dataclasses.replace(LONG, packed=True, examples=3), gpu)
    kernels = {name.replace("variable-length flash", "flash") for name in packed.trace.log.kernels}
    assert kernels == set(simulate_run(CONFIG, LONG, gpu).trace.log.kernels)
    assert "variable-length flash attention, backward" in packed.trace.log.kernels
    assert larger_than_the_residual(packed) == set()
    base = dataclasses.replace(LONG.base, head_bits=8, stream_layers=True)
    small = simulate_run(CONFIG, dataclasses.replace(LONG, base=base), gpu)
    assert larger_than_the_residual(small) == set()


def test_the_plain_step_holds_such_tensors(gpu) -> None:
    step = simulate_run(CONFIG, PLAIN, gpu).trace.log.allocations
    assert any(a.size_bytes == 2 * RESIDUAL_BYTES and a.phase == "forward" for a in step)


def test_every_input_but_the_last_waits_pinned_and_crosses_twice(long_run) -> None:
    inputs = (LAYERS - 1) * RESIDUAL_BYTES
    assert long_run.accounts.pinned_bytes == inputs
    assert long_run.accounts.moved_bytes == 2 * inputs + LOOKED_UP_BYTES
    kernels = long_run.trace.log.kernels
    assert kernels["copy to host memory"] == kernels["copy to the card"] > 0


def test_the_embeddings_are_not_on_the_card(long_run, gpu) -> None:
    table = 2048 * WIDTH * 2
    assert long_run.accounts.host_table_bytes == table
    plain = dataclasses.replace(LONG, base=BaseSpec("nf4"))
    more = simulate_run(CONFIG, plain, gpu).on(gpu).by_component["embeddings and heads"]
    assert more - long_run.on(gpu).by_component["embeddings and heads"] == table


def test_ids_go_down_and_rows_come_up_in_every_pass(gpu) -> None:
    shape = dataclasses.replace(PLAIN, base=BaseSpec("nf4", embeddings_on_host=True))
    shape = dataclasses.replace(shape, accumulation=3)
    run = simulate_run(CONFIG, shape, gpu)
    found, kernels = run.on(gpu), run.trace.log.kernels
    # the first step has one pass, the second stands for all with two, evaluation has one
    assert kernels["copy to host memory"] == kernels["copy to the card"] == 4
    ids, rows = TOKENS * 8, RESIDUAL_BYTES
    copies = Counter(
        (a.size_bytes, a.on_host)
        for a in run.trace.log.allocations
        if a.operator == "_to_copy.default" and "memory/transfers.py" in a.where
    )
    assert copies == {(ids, True): 4, (rows, False): 4}
    assert found.moved_bytes == 3 * (ids + rows)
    host = found.host_bytes_by_phase
    assert host["forward"] - host["backward"] == ids + rows
    assert (
        simulate_run(CONFIG, dataclasses.replace(shape, base=PLAIN.base), gpu).on(gpu).moved_bytes
        == 0
    )


def test_a_head_of_the_host_is_on_the_card_in_the_loss_and_nowhere_else(long_run, gpu) -> None:
    base = dataclasses.replace(LONG.base, head_on_host=True)
    moved = simulate_run(CONFIG, dataclasses.replace(LONG, base=base), gpu)
    head, whole, found = 2048 * WIDTH * 2, long_run.on(gpu), moved.on(gpu)
    for phase in ("load", "backward"):
        gone = whole.allocated_by_phase[phase] - found.allocated_by_phase[phase]
        assert head - 512 <= gone <= head, phase
    assert found.pinned_bytes - whole.pinned_bytes == head
    assert found.moved_bytes - whole.moved_bytes == head
    assert found.host_bytes - whole.host_bytes == head
    assert moved.accounts.base_parameters == long_run.accounts.base_parameters
    came = Counter(
        a.phase
        for a in moved.trace.log.allocations
        if a.size_bytes == head and a.component == "embeddings and heads" and not a.on_host
    )
    assert came == {"load": 1, "forward": 2, "evaluation": 1}  # looked at once, then two steps
    given_back = sum(kind == EMPTY_CACHE for kind, _ in moved.trace.log.events)
    assert given_back == 2 * came.total()


def test_each_technique_alone_takes_less_than_the_plain_step(gpu) -> None:
    changes = [
        {"activations": "offload"},
        {"techniques": Techniques(fused_mlp=True)},
        {"techniques": Techniques(tiled_norms=True)},
        {"base": BaseSpec("nf4", embeddings_on_host=True)},
        {"base": BaseSpec("nf4", head_on_host=True)},
        {"base": BaseSpec("nf4", head_bits=8)},
        {"base": BaseSpec("nf4", head_bits=4)},
        {"base": BaseSpec("nf4", stream_layers=True)},
    ]
    plain = simulate_run(CONFIG, PLAIN, gpu).on(gpu).allocated_bytes
    for change in changes:
        changed = dataclasses.replace(PLAIN, **change)
        assert simulate_run(CONFIG, changed, gpu).on(gpu).allocated_bytes < plain, change


def test_the_prediction_says_what_is_pinned_and_how_long_the_copies_take(long_run, gpu) -> None:
    found = long_run.on(gpu)
    inputs = (LAYERS - 1) * RESIDUAL_BYTES
    assert found.pinned_bytes == inputs
    assert found.moved_bytes == 2 * inputs + LOOKED_UP_BYTES
    assert found.moving_seconds == pytest.approx(found.moved_bytes / 12e9)
    plain = simulate_run(CONFIG, dataclasses.replace(LONG, activations="recompute"), gpu).on(gpu)
    assert plain.moved_bytes == LOOKED_UP_BYTES
    assert plain.pinned_bytes == 0
    assert found.host_bytes - plain.host_bytes == inputs


def test_a_small_head_takes_its_codes_and_scales(gpu) -> None:
    numbers = 2048 * WIDTH
    wanted = {16: 2 * numbers, 8: numbers + 4 * 2048, 4: numbers // 2}
    for bits, size in wanted.items():
        shape = dataclasses.replace(PLAIN, base=BaseSpec("nf4", head_bits=bits))
        found = simulate_run(CONFIG, shape, gpu).on(gpu).by_component
        scales = found["quantization state"]
        if bits == 16:
            bare = scales
        table = 2 * numbers
        head = found["embeddings and heads"] - table + (scales - bare)
        assert size <= head <= size * 1.04, bits


def test_streamed_layers_are_on_the_card_by_twos_and_cross_it_twice_but_where_they_turn(
    long_run, streamed_run, gpu
) -> None:
    whole, streamed = long_run.on(gpu), streamed_run.on(gpu)
    of_one = streamed_run.accounts.waiting_bytes // LAYERS
    flat = streamed.by_component["streamed layers"] // 2
    assert flat <= of_one < flat + 2**20
    assert streamed.by_component["base weights"] == LAYERS * 7  # what stands in their places
    assert streamed.pinned_bytes - whole.pinned_bytes == LAYERS * of_one
    assert streamed.moved_bytes - whole.moved_bytes == 2 * (LAYERS - 2) * flat
    assert streamed.host_bytes - whole.host_bytes == LAYERS * of_one
    assert streamed.allocated_bytes < whole.allocated_bytes
    assert streamed_run.accounts.base_parameters == long_run.accounts.base_parameters


def test_label_smoothing_and_z_loss_take_a_few_numbers_per_chunk(long_run, gpu) -> None:
    shape = dataclasses.replace(LONG, regularized=Regularized(0.1, 1e-4))
    regularized = simulate_run(CONFIG, shape, gpu)
    with_it, without = (
        Counter((a.operator, a.size_bytes) for a in run.trace.log.allocations)
        for run in (regularized, long_run)
    )
    more = with_it - without
    assert without - with_it == Counter()
    assert {"mean.dim", "log.default", "pow.Tensor_Scalar"} <= {operator for operator, _ in more}
    assert max(size for _, size in more) == 4 * PLAIN.loss_chunk_tokens  # a number per token
    # They come and go beside the logits' copies, so the peak may not see them at all.
    peak = regularized.on(gpu).allocated_bytes - long_run.on(gpu).allocated_bytes
    assert 0 <= peak <= 16 * 512
