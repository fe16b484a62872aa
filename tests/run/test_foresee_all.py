"""Workers foresee what one process foresees: the same bytes, in the order they were asked in."""

from pathlib import Path

import pytest
from transformers import LlamaConfig

from qlora_trainer.memory.gpus import read_gpu
from qlora_trainer.run.budget import Budget
from qlora_trainer.run.foresee import run_for_model
from qlora_trainer.run.foresee_all import _workers, foresee_all


def test_workers_foresee_what_this_process_foresees(tmp_path: Path) -> None:
    if _workers(8) < 2:
        pytest.skip("one core, or no room for a second process: there are no workers here")
    LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    ).save_pretrained(tmp_path)  # fmt: skip
    gpu = read_gpu("rtx-3060-12gb")
    budget = Budget(gpu, gpu.usable_bytes, False, ())
    lengths = range(32, 32 * 9, 32)
    runs = [
        (run_for_model(str(tmp_path), [f"data.max_seq_len={tokens}"]), budget) for tokens in lengths
    ]
    several = list(foresee_all(runs, with_timeline=True))
    alone = [next(foresee_all([asked])) for asked in runs]
    assert [f.by_component for f in several] == [f.by_component for f in alone]
    assert [f.reserved_bytes for f in several] == [f.reserved_bytes for f in alone]
    assert [bool(f.timeline) for f in several] == [True] + [False] * 7
