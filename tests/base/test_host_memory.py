"""Memory that was freed goes back to the system."""

import psutil
import pytest
import torch

from qlora_trainer.base.host_memory import give_back_free_memory


def test_what_lies_free_below_a_live_tensor_is_given_back() -> None:
    process = psutil.Process()
    tensors = [torch.ones(24 * 1024) for _ in range(2000)]  # 96 KiB each: from the heap
    last = tensors[-1]  # holds the top of the heap, so that free() alone returns nothing below
    del tensors
    before = process.memory_info().rss
    if not give_back_free_memory():
        pytest.skip("this C library has no malloc_trim")
    assert before - process.memory_info().rss > 100 * 2**20
    assert float(last.sum()) == 24 * 1024
