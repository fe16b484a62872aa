import functools
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_trainer.memory.foresight import simulate_run
from qlora_trainer.memory.measure import predict_cpu, watched_step, without_evaluation
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.training.step import train_step
from qlora_trainer.training.techniques import Techniques
from tests.memory.models import loaded_steps, real_steps, run_shape, tiny_config
from tests.training.tiny import CPU, adapted_llama, batch, optimizer_for


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3"])
@pytest.mark.parametrize(
    ("quantization", "activations", "dtype"),
    [("nf4", "recompute", torch.bfloat16), ("none", "keep", torch.float32)],
)
def test_predicted_peak_is_within_half_a_percent_of_real_steps(
    name, quantization, activations, dtype
):
    config = tiny_config(name)
    shape = run_shape(quantization, activations, dtype)
    predicted, real = predict_cpu(config, shape), real_steps(config, shape)
    assert predicted.peak_bytes == pytest.approx(real.allocated_bytes, rel=0.005)


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_weights_that_come_in_parts_are_foreseen_so(activations):
    config = tiny_config("llama")
    config.hidden_size, config.head_dim, config.num_hidden_layers = 1024, 256, 2
    config.intermediate_size = 4096  # times 1,024 in fp32 two parts of 8 MiB
    shape = run_shape("nf4", activations, torch.float32, micro_batch_size=1, seq_len=32)
    predicted, real = predict_cpu(config, shape), real_steps(config, shape)
    assert predicted.peak_bytes == pytest.approx(real.allocated_bytes, rel=0.005)
    for phase in ("forward", "backward"):
        assert predicted.by_phase[phase] == pytest.approx(real.by_phase[phase], rel=0.005)


def test_real_phases_agree_with_predicted_phases():
    config, shape = tiny_config("llama"), run_shape()
    predicted, real = predict_cpu(config, shape), real_steps(config, shape)
    for phase in ("forward", "backward", "optimizer step"):
        assert predicted.by_phase[phase] == pytest.approx(real.by_phase[phase], rel=0.005)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_32bit"])
def test_every_optimizer_is_foreseen(optimizer):
    config, shape = tiny_config("llama"), run_shape(optimizer=optimizer)
    predicted, real = predict_cpu(config, shape), real_steps(config, shape)
    assert predicted.by_component["adapters"] == real.by_component["adapters"]
    # pageable states are outside the card's allocator but in a CPU's memory: all tiny here
    assert predicted.peak_bytes == pytest.approx(real.allocated_bytes, rel=0.005)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_the_techniques_of_the_step_are_foreseen_as_they_run(name):
    techniques = Techniques(fused_mlp=True, mlp_tile_tokens=48, tiled_norms=True, fused_qkv=True)
    shape = run_shape(activations="offload", techniques=techniques)
    config = tiny_config(name)
    predicted, real = predict_cpu(config, shape), real_steps(config, shape)
    assert predicted.peak_bytes == pytest.approx(real.allocated_bytes, rel=0.01)


def test_a_step_without_what_is_on_by_itself_is_foreseen_as_it_runs():
    config = tiny_config("llama")
    plain = run_shape(chunked_loss=False, techniques=Techniques(fused_linear=False))
    predicted, real = predict_cpu(config, plain), real_steps(config, plain)
    assert predicted.peak_bytes == pytest.approx(real.allocated_bytes, rel=0.01)
    assert predicted.peak_bytes > 1.05 * predict_cpu(config, run_shape()).peak_bytes


def test_a_base_with_attention_dropout_takes_the_kernel_that_builds_every_score():
    config, shape = tiny_config("llama"), run_shape("nf4", "keep", torch.bfloat16)
    config.attention_dropout = 0.1
    predicted, real = predict_cpu(config, shape), real_steps(config, shape)
    assert predicted.peak_bytes == pytest.approx(real.allocated_bytes, rel=0.005)


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # gemma2 caps its logits
def test_a_large_vocabulary_is_foreseen_a_slice_at_a_time(name):
    config, shape = tiny_config(name), run_shape("none", seq_len=100)
    config.vocab_size, tokens = 40_000, 2 * 99
    run = simulate_run(config, shape, None)
    predicted, real = without_evaluation(run.trace).live(), real_steps(config, shape)
    assert predicted.peak_bytes == pytest.approx(real.allocated_bytes, rel=0.005)
    # The chunk in bf16 and a slice of a quarter of its tokens in fp32, which are 8 MB; all 32 MB
    # of the chunk in fp32 would be far from the 0.5 %. Soft-capping needs a second slice.
    quarter = tokens * config.vocab_size
    slices = 2 if name == "gemma2" else 1
    found = [peak.by_component["logits and loss"] for peak in (predicted, real)]
    assert found == pytest.approx([(2 + slices) * quarter] * 2, rel=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose head outweighs what a step makes beside it."""
    config = tiny_config("llama")
    config.vocab_size = 6000
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


@functools.cache
def compared(folder, **base):
    """Predicted and measured steps of the checkpoint, its base held otherwise."""
    shape = run_shape(loss_chunk_tokens=16)
    shape = replace(shape, base=replace(shape.base, **base))
    config = tiny_config("llama")
    config.vocab_size = 6000
    return predict_cpu(config, shape), loaded_steps(folder, shape)


HELD = ("embeddings and heads", "quantization state")


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_head_of_fewer_bits_takes_what_was_foreseen(folder, bits):
    predicted, real = compared(folder, head_bits=bits)
    # 0.06 % of so small a model is the batch: on a card a copy, gone before the backward
    assert predicted.peak_bytes == pytest.approx(real.allocated_bytes, rel=0.001)
    assert [predicted.by_component[name] for name in HELD] == [
        real.by_component[name] for name in HELD
    ]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_head_of_fewer_bits_is_measured_smaller(folder, bits):
    # The peak need not be: of a head as small as one tile, the tile is as large as the head.
    whole, small = (
        sum(compared(folder, head_bits=b)[1].by_component[name] for name in HELD)
        for b in (16, bits)
    )
    saved = 6000 * 128 * (16 - bits) // 8
    assert 0.95 * saved <= whole - small <= saved


def test_embeddings_left_on_a_cpu_are_copied_nowhere(folder):
    predicted, real = compared(folder, embeddings_on_host=True)
    assert predicted.peak_bytes == pytest.approx(real.allocated_bytes, rel=0.001)
    shape = run_shape()
    shape = replace(shape, base=replace(shape.base, embeddings_on_host=True))
    assert simulate_run(tiny_config("llama"), shape, None).accounts.moved_bytes == 0


def test_streamed_layers_take_what_was_foreseen(folder):
    predicted, real = compared(folder, stream_layers=True)
    assert predicted.peak_bytes == pytest.approx(real.allocated_bytes, rel=0.001)
    _, whole = compared(folder)
    assert real.allocated_bytes < whole.allocated_bytes


def test_a_window_made_beside_a_step_is_not_counted_with_it():
    model, beside, found = adapted_llama(), [], []
    optimizer, task = optimizer_for(model), CausalLM.for_model(model)
    for makers in (0, 0, 1):  # the first has no states of the optimizer yet
        with watched_step(model, optimizer, CPU, found):
            for _ in range(makers):
                thread = threading.Thread(target=lambda: beside.append(torch.zeros(2**22) + 1))
                thread.start()
                thread.join()
            train_step(
                model, [task.prepare(batch(2, 10, 1))], task=task, optimizer=optimizer,
                learning_rate=0.0, device=CPU,
            )  # fmt: skip
    assert len(beside) == 1
    assert found[1].peak_bytes == found[2].peak_bytes < beside[0].nbytes
