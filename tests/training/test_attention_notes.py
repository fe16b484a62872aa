"""Attention that grows with the square of a row costs memory, and the user is told."""

from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from qlora_trainer.base.packed_attention import use_packed_attention
from qlora_trainer.config.read import check_values
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.training.setup import attention_notes

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 50,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip


def a_run(max_seq_len: int = 32, **data: Any) -> RunConfig:
    given = {"train": "d", "packing": True, "max_seq_len": max_seq_len}
    return check_values({"model": {"source": "m"}, "data": given | data})


def test_packed_rows_that_keep_their_mask_say_so() -> None:
    with torch.device("meta"):
        model = PhimoeForCausalLM(PhimoeConfig(**SIZES, num_local_experts=2, sliding_window=16))
    (said,) = attention_notes(a_run(max_seq_len=32), model)
    assert "window of 16 tokens" in said
    assert not list(attention_notes(a_run(max_seq_len=16), model))


def eager(name: str) -> Any:
    """Of Gemma 2 transformers' own choice, of Llama the user's."""
    with torch.device("meta"):
        if name == "gemma2":
            return Gemma2ForCausalLM(Gemma2Config(**SIZES))
        return LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager"))


@pytest.mark.parametrize(
    ("name", "way_out"),
    [("gemma2", "'flash_attention_2' on a GPU builds none"), ("llama", "'auto' builds none")],
)
def test_eager_attention_is_named_packed_or_not(name: str, way_out: str) -> None:
    model = eager(name)
    assert not use_packed_attention(model)
    (plain,) = attention_notes(a_run(packing=False), model)
    assert "builds all scores" in plain
    assert plain.endswith(way_out)
    scores, mask = attention_notes(a_run(), model)
    assert scores == plain
    assert "keeps the mask of the whole packed row, because its attention is eager" in mask
    assert list(attention_notes(a_run(mask_free_packing=False), model)) == [plain]


def test_layers_that_take_no_attention_from_outside_are_named() -> None:
    class Closed(LlamaForCausalLM):
        _supports_attention_backend = False

    with torch.device("meta"):
        model = Closed(LlamaConfig(**SIZES))
    assert not use_packed_attention(model)
    (said,) = attention_notes(a_run(), model)
    assert "take no attention from outside" in said


def test_a_model_that_takes_packed_rows_needs_no_note() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert not list(attention_notes(a_run(packing=False), model))
    assert use_packed_attention(model)
    assert not list(attention_notes(a_run(), model))
