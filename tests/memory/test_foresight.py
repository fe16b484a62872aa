from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from qlora_trainer.base.load import BaseSpec
from qlora_trainer.errors import UserError
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.memory.fit import Fitter
from qlora_trainer.memory.foresight import RunShape, foresee, simulate_run
from qlora_trainer.memory.gpus import gpu_keys, read_gpu
from tests.memory.models import run_shape, tiny_config

RTX_3060 = "rtx-3060-12gb"
MIB = 2**20


@pytest.fixture(scope="module")
def small():
    """Llama of 100 million parameters: blocks large enough for the allocator to matter."""
    return LlamaConfig(
        vocab_size=16000, hidden_size=768, intermediate_size=2048, num_hidden_layers=6,
        num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=2048,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shape():
    return RunShape(BaseSpec("nf4"), AdapterSpec(rank=8, alpha=16), seq_len=512)


@pytest.fixture(scope="module")
def run(small, shape):
    return simulate_run(small, shape, read_gpu(RTX_3060))


def test_components_at_the_peak_are_what_is_live(run):
    found = run.on(read_gpu(RTX_3060))
    assert sum(found.by_component.values()) <= found.allocated_bytes <= found.reserved_bytes
    assert {"base weights", "quantization state", "embeddings and heads", "adapters"} <= set(
        found.by_component
    )


def test_every_phase_of_a_run_is_shown(run):
    phases = run.on(read_gpu(RTX_3060)).allocated_by_phase
    assert list(phases) == [
        "load", "forward", "backward", "optimizer step", "evaluation", "save", "resume", "merge",
    ]  # fmt: skip
    assert max(phases.values()) == run.on(read_gpu(RTX_3060)).allocated_bytes


def test_tensors_at_the_peak_name_their_lines(run):
    alive = run.on(read_gpu(RTX_3060)).alive
    assert any("transformers/models/llama" in tensor.where for tensor in alive)
    assert alive[0].total_bytes >= alive[-1].total_bytes


def test_the_kernels_chosen_are_told(small, shape, run):
    assert "flash attention" in run.on(read_gpu(RTX_3060)).kernels
    on_turing = replace(shape, base=BaseSpec("nf4", compute_dtype=torch.float16))
    kernels = foresee(small, on_turing, read_gpu("rtx-2060-6gb")).kernels
    assert "flash attention" not in kernels
    # torch's fused kernels on Turing know no grouped keys: base/expanded_attention.py repeats them
    assert "memory-efficient attention" in kernels
    assert not any("math" in kernel for kernel in kernels)


def test_a_budget_too_small_does_not_fit_and_a_large_one_does(run):
    card = read_gpu(RTX_3060)
    needed = run.on(card).total_bytes
    assert run.on(card, budget_bytes=needed // 2).verdict == "does not fit"
    assert run.on(card, budget_bytes=needed).verdict == "tight"
    assert run.on(card, budget_bytes=2 * needed).verdict == "fits"


def test_recomputing_needs_less_than_keeping(small, shape, run):
    card = read_gpu(RTX_3060)
    kept = foresee(small, replace(shape, activations="keep"), card)
    assert kept.allocated_bytes > run.on(card).allocated_bytes


def test_paged_states_are_counted_apart(small, shape, run):
    card = read_gpu(RTX_3060)
    wide = replace(shape, adapter=AdapterSpec(rank=256, alpha=16), adapter_dtype=torch.float32)
    paged = simulate_run(small, wide, card)
    plain = simulate_run(small, replace(wide, optimizer="adamw"), card)
    assert paged.accounts.paged_bytes > 0 == plain.accounts.paged_bytes
    assert paged.on(card).allocated_bytes < plain.on(card).allocated_bytes


def test_large_weights_left_in_16_bit_are_named(run):
    assert "model.embed_tokens.weight" in run.on(read_gpu(RTX_3060)).large_unquantized


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3"])
def test_other_architectures_are_foreseen(name):
    found = foresee(tiny_config(name), run_shape(), read_gpu(RTX_3060))
    assert found.fits
    assert found.trained_parameters > 0


def test_padded_batches_take_the_kernel_for_masks(small, shape):
    found = foresee(small, replace(shape, padded=True), read_gpu(RTX_3060))
    assert "memory-efficient attention" in found.kernels


def test_the_longest_sequence_fits_and_the_next_does_not(small, shape):
    card = read_gpu(RTX_3060)
    base = foresee(small, shape, card).total_bytes
    fitter = Fitter(small, shape, card, budget_bytes=base + 40 * MIB)
    answer = fitter.longest_sequence()
    assert 512 <= answer.value < 2048
    assert answer.limit == "card"
    assert answer.foresight.fits
    assert answer.next_value is not None
    assert not fitter.foresee(replace(shape, seq_len=answer.next_value)).fits


def test_the_longest_sequence_ends_where_the_model_does(small, shape):
    answer = Fitter(small, shape, read_gpu("rtx-4090-24gb")).longest_sequence()
    assert (answer.value, answer.limit) == (2048, "model")


def test_the_smallest_change_makes_it_fit(small, shape):
    card = read_gpu(RTX_3060)
    large = replace(shape, micro_batch_size=8)
    budget = foresee(small, replace(shape, micro_batch_size=4), card).total_bytes
    change = Fitter(small, large, card, budget_bytes=budget).smallest_change()
    assert change is not None
    assert "train.micro_batch_size=4" in change.overrides
    assert "train.gradient_accumulation_steps=2" in change.overrides


def test_a_run_that_fits_needs_no_change(small, shape):
    assert Fitter(small, shape, read_gpu(RTX_3060)).smallest_change() is None


def test_an_impossible_run_says_so(small, shape):
    with pytest.raises(UserError, match="smaller model or a larger card"):
        Fitter(small, shape, read_gpu(RTX_3060), budget_bytes=400 * MIB).smallest_change()


def test_an_unknown_card_is_named_with_those_known():
    with pytest.raises(UserError, match="rtx-3060-12gb"):
        read_gpu("voodoo-2")


def test_every_card_profile_is_whole():
    assert len(gpu_keys()) >= 20
    for key in gpu_keys():
        card = read_gpu(key)
        assert card.key == key
        assert card.context_bytes < card.usable_bytes <= card.memory_bytes


@pytest.mark.parametrize("card", [RTX_3060, "rtx-2060-6gb"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "gpt2"])
def test_padded_batches_of_several_rows_are_foreseen(name, card):
    shape = run_shape(padded=True, dtype=torch.float32)
    found = simulate_run(tiny_config(name), shape, read_gpu(card)).on(read_gpu(card))
    assert found.allocated_by_phase["evaluation"] > 0
