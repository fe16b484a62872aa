"""Packed rows that keep their mask cost memory, and the user is told."""

import torch
from transformers import PhimoeConfig, PhimoeForCausalLM

from qlora_trainer.config.read import check_values
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.training.setup import packing_notes


def a_run(max_seq_len: int) -> RunConfig:
    data = {"train": "d", "packing": True, "max_seq_len": max_seq_len}
    return check_values({"model": {"source": "m"}, "data": data})


def test_packed_rows_that_keep_their_mask_say_so() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 50,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    with torch.device("meta"):
        model = PhimoeForCausalLM(PhimoeConfig(**sizes, num_local_experts=2, sliding_window=16))
    (said,) = packing_notes(a_run(max_seq_len=32), model)
    assert "window of 16 tokens" in said
    assert not list(packing_notes(a_run(max_seq_len=16), model))
