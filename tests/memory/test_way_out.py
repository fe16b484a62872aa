"""The smallest change that makes a run fit: lossless first, nothing that is not needed."""

import copy
from dataclasses import replace

import pytest
from transformers import LlamaConfig

from qlora_trainer.base.spec import BaseSpec
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.memory.changes import lossless_changes, lossy_changes
from qlora_trainer.memory.fit import Fitter
from qlora_trainer.memory.foresight import RunShape
from qlora_trainer.memory.gpus import read_gpu
from qlora_trainer.memory.way_out import Plan
from qlora_trainer.training.techniques import Techniques

CARD = read_gpu("rtx-3060-12gb")


@pytest.fixture(scope="module")
def config() -> LlamaConfig:
    """A vocabulary and an MLP large enough that each technique has something to save."""
    return LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=4096, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=8192,
        tie_word_embeddings=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shape() -> RunShape:
    return RunShape(BaseSpec("nf4"), AdapterSpec(rank=8, alpha=16), seq_len=4096)


def fitter_between(config: LlamaConfig, shape: RunShape, smaller: RunShape) -> Fitter:
    """For a card that has just what the smaller run needs, and too little for the other."""
    wide = Fitter(config, shape, CARD)
    needed = wide.foresee(smaller).total_bytes
    fitter = replace(wide, budget_bytes=needed)
    assert fitter.foresee(smaller).fits
    assert not fitter.foresee(shape).fits
    return fitter


def test_a_lossless_technique_is_taken_before_anything_is_lost(
    config: LlamaConfig, shape: RunShape
) -> None:
    tiled = replace(shape, techniques=Techniques(fused_mlp=True, mlp_tile_tokens=2048))
    found = fitter_between(config, shape, tiled).smallest_change()
    assert found is not None
    assert found.foresight.fits
    settings = {override.partition("=")[0] for override in found.overrides}
    assert settings <= {"train.tiled_norms", "train.fused_mlp", "train.mlp_tile_tokens"}


def test_a_loss_of_all_logits_at_once_is_offered_the_chunked_one(
    config: LlamaConfig, shape: RunShape
) -> None:
    plain = replace(shape, chunked_loss=False)
    found = fitter_between(config, plain, shape).smallest_change()
    assert found is not None
    assert found.overrides == ("train.chunked_loss=true",)


def test_many_rows_of_an_evaluation_are_offered_fewer(config: LlamaConfig) -> None:
    short = RunShape(BaseSpec("nf4"), AdapterSpec(rank=8, alpha=16), seq_len=512, held_out_rows=256)
    found = fitter_between(config, short, replace(short, held_out_rows=1)).smallest_change()
    assert found is not None
    assert found.overrides == ("evaluation.micro_batch_size=1",)


def test_kept_activations_are_given_up_for_streamed_layers_before_anything_is_lost(
    config: LlamaConfig, shape: RunShape
) -> None:
    kept = replace(shape, activations="keep")
    streamed = lossless_changes(kept, on_cpu=False, streaming=True)[-1]
    found = [option.apply(kept) for option in streamed]
    assert [(run.base.stream_layers, run.activations) for run in found] == [
        (True, "recompute"), (True, "offload"),
    ]  # fmt: skip
    fitter = Fitter(config, kept, CARD)
    assert all(fitter.foresee(run).total_bytes < fitter.foresee(kept).total_bytes for run in found)


def test_a_packed_row_first_gives_up_its_mask(config: LlamaConfig, shape: RunShape) -> None:
    masked = replace(shape, seq_len=8192, packed=True, mask_free=False, longest_held_out=0)
    found = fitter_between(config, masked, replace(masked, mask_free=True)).smallest_change()
    assert found is not None
    assert found.overrides == ("data.mask_free_packing=true",)


def test_what_is_left_is_all_needed(config: LlamaConfig, shape: RunShape) -> None:
    """Without any one of the changes the run does not fit."""
    every = lossless_changes(shape, on_cpu=False, streaming=False)
    smallest = Plan(tuple(change[-1] for change in every)).apply(shape)
    fitter = fitter_between(config, shape, smallest)
    found = fitter.smallest_change()
    assert found is not None
    assert found.plan.options
    for left_out in found.plan.options:
        others = tuple(option for option in found.plan.options if option is not left_out)
        assert not fitter.foresee(Plan(others).apply(shape)).fits


def test_numbers_change_only_where_nothing_lossless_suffices(
    config: LlamaConfig, shape: RunShape
) -> None:
    short = replace(shape, seq_len=256, base=replace(shape.base, quantization="none"))
    every = lossless_changes(short, on_cpu=False, streaming=True)
    smallest = Plan(tuple(change[-1] for change in every)).apply(short)
    base = replace(smallest.base, quantization="nf4", head_bits=8, head_on_host=False)
    smaller = replace(smallest, base=base)
    fitter = fitter_between(config, short, smaller)
    assert not fitter.foresee(smallest).fits
    found = fitter.smallest_change()
    assert found is not None
    settings = {override.partition("=")[0] for override in found.overrides}
    changes = lossy_changes(short, on_cpu=False)
    assert settings & {name for change in changes for option in change for name in option.overrides}
    assert not settings & {"data.max_seq_len", "adapter.rank"}


def test_on_a_cpu_nothing_is_moved_to_the_memory_that_lacks(shape: RunShape) -> None:
    offered = [
        option.overrides
        for change in lossless_changes(shape, on_cpu=True, streaming=False)
        for option in change
    ]
    settings = {name for overrides in offered for name in overrides}
    assert "train.fused_mlp" in settings
    of_host = {"model.embeddings_on_host", "model.head_on_host", "model.stream_layers"}
    assert not settings & {*of_host, "train.activations"}


def test_a_model_that_cannot_have_a_change_is_offered_the_others(
    config: LlamaConfig, shape: RunShape
) -> None:
    tied = copy.deepcopy(config)
    tied.tie_word_embeddings = True
    _, together = Fitter(tied, shape, CARD).way_out().all_lossless(streaming=False)
    of_table = {"model.embeddings_on_host=true", "model.head_on_host=true"}  # one, so both or none
    assert of_table <= set(together.overrides)
    labels = replace(shape, task="sequence-classification", task_settings={"labels": 2})
    changes, together = Fitter(config, labels, CARD).way_out().all_lossless(streaming=False)
    assert changes
    assert of_table & set(together.overrides) == {"model.embeddings_on_host=true"}


def test_techniques_make_longer_sequences_and_only_those_needed_are_named(
    config: LlamaConfig, shape: RunShape
) -> None:
    budget = Fitter(config, shape, CARD).foresee(replace(shape, seq_len=1024)).total_bytes
    fitter = Fitter(config, shape, CARD, budget_bytes=budget)
    plain = fitter.longest_sequence(256)
    longer = fitter.longest_with_techniques(plain)
    assert longer is not None
    assert longer.value > plain.value
    assert longer.foresight.fits
    assert f"data.max_seq_len={longer.value}" in longer.overrides
    assert len(longer.overrides) > 1


def test_larger_batches_are_foreseen_padded_as_they_run(
    config: LlamaConfig, shape: RunShape
) -> None:
    short = replace(shape, seq_len=64)
    fitter = Fitter(config, short, CARD, budget_bytes=700 * 2**20)
    padded, packed = (
        replace(fitter, shape=replace(short, packed=way, longest_held_out=0)).largest_micro_batch()
        for way in (False, True)
    )
    assert "memory-efficient attention" in padded.foresight.kernels
    assert "memory-efficient attention" not in packed.foresight.kernels
    assert "variable-length flash attention" in packed.foresight.kernels
