"""Memory that was freed is used again within a step, and goes back to the system after it."""

import subprocess
import sys

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


_FAULTS = """
import resource, sys, torch
from qlora_trainer.base.host_memory import give_back_free_memory, keep_free_memory
import psutil
torch.set_num_threads(1)
assert sys.argv[1] == "as-it-is" or keep_free_memory()
def step():
    kept = torch.ones(512, 1536)
    return (kept + torch.ones(512, 1536)).sum()
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
held = [torch.ones(2**22) for _ in range(8)]
del held
full = psutil.Process().memory_info().rss
give_back_free_memory()
print((full - psutil.Process().memory_info().rss) >> 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's mallopt")
def test_a_step_asks_the_system_for_no_page_twice_and_all_of_them_go_back() -> None:
    def run(how: str) -> list[int]:
        command = [sys.executable, "-c", _FAULTS, how]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if how == "kept" and "AssertionError" in done.stderr:
            pytest.skip("this C library has no mallopt")
        return [int(line) for line in done.stdout.split()]

    faults, _ = run("as-it-is")
    fewer, given_back = run("kept")
    assert 5 * fewer < faults
    assert given_back >= 100  # of 128 MiB
