from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.memory.allocator import MIB, CachingAllocator, OutOfMemory
from qlora_trainer.memory.transfers import pinned_bytes


def test_sizes_round_up_to_512_bytes():
    allocator = CachingAllocator()
    allocator.allocate(1)
    allocator.allocate(513)
    assert allocator.allocated_bytes == 512 + 1024


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (100, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (11 * MIB + 1, 12 * MIB),
    ],
)
def test_segment_sizes_follow_the_request(size, segment):
    allocator = CachingAllocator()
    allocator.allocate(size)
    assert allocator.reserved_bytes == segment


def test_a_remainder_of_at_most_one_mib_counts_as_allocated():
    allocator = CachingAllocator()
    allocator.allocate(19 * MIB)  # a segment of its own: 20 MiB
    assert allocator.allocated_bytes == 20 * MIB


def test_a_remainder_above_one_mib_is_split_off_and_used():
    allocator = CachingAllocator()
    allocator.allocate(8 * MIB)
    allocator.allocate(9 * MIB)
    assert allocator.allocated_bytes == 17 * MIB
    assert allocator.reserved_bytes == 20 * MIB


def test_the_smallest_sufficient_block_is_taken():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size * MIB) for size in (40, 30, 50)]
    for block in blocks:
        allocator.free(block)
    taken = allocator.allocate(29 * MIB)
    assert taken.size == 30 * MIB


def test_of_equal_blocks_the_one_reserved_last_is_taken_first():
    allocator = CachingAllocator()  # the driver gives large segments from the top down
    first, second = allocator.allocate(40 * MIB), allocator.allocate(40 * MIB)
    allocator.free(first)
    allocator.free(second)
    assert allocator.allocate(40 * MIB).address == second.address < first.address


def test_freed_neighbours_merge():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(4 * MIB) for _ in range(5)]
    for block in (blocks[0], blocks[2], blocks[1]):
        allocator.free(block)
    allocator.allocate(12 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_a_full_card_gives_whole_free_segments_back_and_tries_again():
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    kept = allocator.allocate(40 * MIB)
    allocator.free(allocator.allocate(60 * MIB))
    big = allocator.allocate(50 * MIB + 10 * MIB)
    assert allocator.retries == 0
    allocator.free(big)
    allocator.free(kept)
    allocator.allocate(90 * MIB)
    assert allocator.retries == 1
    assert allocator.reserved_bytes == 90 * MIB


def test_fragments_make_a_card_overflow_although_the_sum_would_fit():
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    pieces = [allocator.allocate(4 * MIB) for _ in range(25)]
    for piece in pieces[::2]:
        allocator.free(piece)
    with pytest.raises(OutOfMemory) as full:
        allocator.allocate(20 * MIB)
    assert full.value.allocated_bytes == 12 * 4 * MIB


def test_expandable_segments_reserve_less_for_growing_sizes():
    plain, expandable = CachingAllocator(), CachingAllocator(expandable_segments=True)
    for allocator in (plain, expandable):
        for size in (100, 200, 300, 400):
            allocator.free(allocator.allocate(size * MIB))
    assert plain.reserved_bytes == 1000 * MIB
    assert expandable.reserved_bytes == 400 * MIB


def test_a_block_used_on_another_stream_waits_for_its_event():
    allocator = CachingAllocator()
    block = allocator.allocate(40 * MIB)
    allocator.record_stream(block, 1)
    allocator.free(block)
    allocator.allocate(40 * MIB)
    assert allocator.reserved_bytes == 80 * MIB
    allocator.synchronize(1)
    allocator.allocate(40 * MIB)
    assert allocator.reserved_bytes == 80 * MIB


def test_streams_do_not_share_free_blocks():
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(40 * MIB))
    allocator.allocate(40 * MIB, stream=1)
    assert allocator.reserved_bytes == 80 * MIB


def test_empty_cache_keeps_segments_in_use():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(4 * MIB) for _ in range(6)]
    allocator.free(blocks[0])
    allocator.free(blocks[5])
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 30 * MIB)), max_size=120),
    st.booleans(),
)
def test_reserved_covers_allocated_and_all_comes_back(steps, expandable):
    allocator = CachingAllocator(expandable_segments=expandable)
    live = []
    for free, size in steps:
        if free and live:
            allocator.free(live.pop(size % len(live)))
        else:
            live.append(allocator.allocate(size))
        assert allocator.allocated_bytes == sum(block.size for block in live)
        assert allocator.allocated_bytes <= allocator.reserved_bytes
        spans = sorted((block.address, block.address + block.size) for block in live)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.allocated_bytes == 0
    assert allocator.reserved_bytes == 0


def test_an_event_of_one_stream_does_not_free_what_another_still_uses():
    # c10/cuda/CUDACachingAllocator.cpp, process_events: freed when event_count reaches 0
    allocator = CachingAllocator()
    block = allocator.allocate(40 * MIB)
    allocator.record_stream(block, 1)
    allocator.record_stream(block, 2)
    allocator.free(block)
    assert allocator.allocated_bytes == 0
    allocator.synchronize(1)
    allocator.allocate(40 * MIB)
    assert allocator.reserved_bytes == 80 * MIB
    allocator.synchronize(2)
    allocator.allocate(40 * MIB)
    assert allocator.reserved_bytes == 80 * MIB


@pytest.mark.parametrize(("asked", "taken"), [(1, 1), (MIB, MIB), (MIB + 1, 2 * MIB), (0, 0)])
def test_pinned_memory_comes_in_powers_of_two(asked, taken):
    # aten/src/ATen/core/CachingHostAllocator.h, CachingHostAllocatorImpl::allocate
    assert pinned_bytes(asked) == taken
