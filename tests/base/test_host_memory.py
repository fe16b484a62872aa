"""Memory that was freed goes back to the system."""

import os
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


_BETWEEN = """
import sys, resource, torch
from qlora_trainer.base.host_memory import FreedPages, keep_freed_pages
keep_freed_pages()
freed = FreedPages(torch.device("cpu"))
def step(mebibytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    freed.before_step()
    held = [torch.ones(2**18) for _ in range(mebibytes)]  # 1 MiB each
    del held
    freed.after_step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for mebibytes in map(int, sys.argv[1:]):
    taken = step(mebibytes)
print(taken)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults of glibc's heap")
def test_freed_pages_stay_until_more_are_held_than_a_step_needs() -> None:
    def faults(*mebibytes: str) -> int:
        command = [sys.executable, "-c", _BETWEEN, *mebibytes]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout)

    if not give_back_free_memory():
        pytest.skip("this C library has no malloc_trim")
    pages = 64 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert faults("64", "64", "64") < pages / 10  # the same pages again
    assert faults("64", "70", "64") < pages / 10  # those of a step not much larger
    # 512 MiB beside torch's own: more than an eighth too much, so it is given back
    assert faults("64", "512", "64") > pages / 2
    # which a step that began without holes needs again, so that from then on it stays
    assert faults("64", "512", "512", "64", "512") < pages


_SHAPES = """
import sys, torch, psutil
from qlora_trainer.base.host_memory import give_back_free_memory, keep_few_shapes
torch.set_num_threads(1)
if sys.argv[1] == "few":
    keep_few_shapes()
weights = [torch.ones(size, 256, dtype=torch.bfloat16) for size in range(256, 576, 32)]
def growth(lengths):
    give_back_free_memory()
    before = psutil.Process().memory_info().rss
    for length in lengths:
        for weight in weights:
            torch.nn.functional.linear(torch.ones(length, 256, dtype=torch.bfloat16), weight)
    give_back_free_memory()
    return (psutil.Process().memory_info().rss - before) >> 10
growth(range(40, 56))
print(growth(range(56, 96)))
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_batches_of_ever_new_lengths_do_not_add_up() -> None:
    def run(how: str) -> int:
        command = [sys.executable, "-c", _SHAPES, how]
        free = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=free)
        return int(done.stdout)

    as_it_is, bounded = run("all"), run("few")
    if as_it_is < 8 * 1024:
        pytest.skip("this CPU's kernels are not compiled for each shape")
    assert 8 * bounded < as_it_is
