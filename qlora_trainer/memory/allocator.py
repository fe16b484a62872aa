"""A model of CUDA's caching allocator: which blocks a log of births and deaths really takes.

Every byte `torch.cuda.max_memory_allocated` and `max_memory_reserved` report follows from the rules
below, taken from c10/cuda/CUDACachingAllocator.cpp and c10/cuda/CUDAAllocatorConfig.h (torch 2.x):

- sizes round up to 512 B (`round_size`, kMinBlockSize);
- at most 1 MiB comes from the small pool, in 2 MiB segments; less than 10 MiB from 20 MiB segments;
  the rest from segments rounded up to 2 MiB (`get_allocation_size`);
- the smallest sufficient free block of pool and stream is taken (`get_free_block`); a block of the
  small pool is split if 512 B remain, of the large pool only if *more than 1 MiB* remains
  (`should_split`); otherwise the whole block counts as allocated;
- a freed block merges with free neighbours of its segment (`try_merge_blocks`);
- when the card is full, wholly free segments go back and the request is tried again
  (`release_cached_blocks`); then it is out of memory;
- `expandable_segments`: one segment per pool and stream grows in pages of 2 MiB (small) or 20 MiB
  (large), every remainder of 512 B splits (`ExpandableSegment`, `try_allocate_expandable_block`);
- blocks of equal size are taken by lowest address, so the driver's choice of addresses decides
  which segment is broken up. The driver fills address space from the top down, one reservation per
  large segment; segments of at most 32 MiB are packed upwards into common reservations below them.
  (Not documented by NVIDIA. Seen in the measurements: with ascending addresses eager-attention runs
  come out up to one score matrix wrong in reserved memory, with this order exact to the byte);
- a block used on another stream is free only after that stream's event (`record_stream`).

Not modelled: the other keys of the allocator's configuration (`memory/allocator_settings.py` names
those that are set), all off by default, and CUDA graphs' private pools.
"""

from qlora_trainer.memory.blocks import Block, Pool

MIB = 2**20
MIN_BLOCK = 512
SMALL_SIZE = MIB
SMALL_BUFFER = 2 * MIB
LARGE_BUFFER = 20 * MIB
MIN_LARGE_ALLOC = 10 * MIB
ROUND_LARGE = 2 * MIB
DRIVER_CHUNK = 32 * MIB


class OutOfMemory(Exception):
    """No segment could be had within the capacity."""

    def __init__(self, wanted_bytes: int, allocated_bytes: int, reserved_bytes: int) -> None:
        super().__init__(f"{wanted_bytes} more bytes on top of {reserved_bytes} reserved")
        self.wanted_bytes = wanted_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes


class CachingAllocator:
    """Replay births and deaths; read `allocated_bytes`, `reserved_bytes` and their peaks.

    Args:
        capacity_bytes: What the card has for this process beside its context; None is unlimited.
        expandable_segments: As PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.
    """

    def __init__(
        self, capacity_bytes: int | None = None, expandable_segments: bool = False
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.expandable = expandable_segments
        self.allocated_bytes = self.reserved_bytes = 0
        self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self.retries = 0
        self._pools: dict[tuple[bool, int], Pool] = {}
        self._pending: list[tuple[int, Block]] = []  # (stream, block) whose event has not passed
        self._low_address = 1 << 30
        self._high_address = 1 << 46

    # ---- what torch.cuda offers ------------------------------------------------------------
    def allocate(self, size_bytes: int, stream: int = 0) -> Block:
        """`malloc`: best fit, then a new segment, then release the cache and try again."""
        size = max(MIN_BLOCK, (size_bytes + MIN_BLOCK - 1) // MIN_BLOCK * MIN_BLOCK)
        is_small = size <= SMALL_SIZE
        pool = self._pools.get((is_small, stream))
        if pool is None:
            pool = self._pools[(is_small, stream)] = Pool(is_small)
        block = pool.best_fit(size)
        if block is not None:
            pool.remove(block)
        else:
            block = self._new_block(pool, size)
        return self._hand_out(block, size)

    def free(self, block: Block) -> None:
        """`free`: at once, or after the events of other streams that used the block."""
        block.allocated = False
        self.allocated_bytes -= block.size
        if block.uses:
            block.events = len(block.uses)
            self._pending.extend((stream, block) for stream in sorted(block.uses))
            block.uses.clear()
        else:
            block.pool.give_back(block)

    def record_stream(self, block: Block, stream: int) -> None:
        """Another stream uses the block: not to be reused before that stream's event."""
        block.uses.add(stream)

    def synchronize(self, stream: int | None = None) -> None:
        """The events of `stream` (all when None) have passed."""
        waiting, self._pending = self._pending, []
        for used_on, block in waiting:
            if stream is not None and used_on != stream:
                self._pending.append((used_on, block))
                continue
            block.events -= 1
            if block.events == 0:
                block.pool.give_back(block)

    def empty_cache(self) -> None:
        """Give wholly free segments back to the driver."""
        self.synchronize()
        for pool in self._pools.values():
            for block in pool:
                if self.expandable:
                    self._unmap(pool, block)
                elif block.previous is None and block.next is None:
                    pool.remove(block)
                    self.reserved_bytes -= block.size

    def reset_peaks(self) -> None:
        """`reset_peak_memory_stats`."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    # ---- segments --------------------------------------------------------------------------
    def _new_block(self, pool: Pool, size: int) -> Block:
        make = self._grow if self.expandable else self._new_segment
        block = make(pool, size)
        if block is None:
            self.retries += 1
            self.empty_cache()
            block = make(pool, size)
        if block is None:
            raise OutOfMemory(size, self.allocated_bytes, self.reserved_bytes)
        return block

    def _reserve(self, size: int) -> bool:
        if self.capacity_bytes is not None and self.reserved_bytes + size > self.capacity_bytes:
            return False
        self.reserved_bytes += size
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return True

    def _new_segment(self, pool: Pool, size: int) -> Block | None:
        if size <= SMALL_SIZE:
            segment = SMALL_BUFFER
        elif size < MIN_LARGE_ALLOC:
            segment = LARGE_BUFFER
        else:
            segment = (size + ROUND_LARGE - 1) // ROUND_LARGE * ROUND_LARGE
        if not self._reserve(segment):
            return None
        if segment <= DRIVER_CHUNK:
            address = self._low_address
            self._low_address += segment
        else:
            self._high_address -= segment
            address = self._high_address
        return Block(address, segment, pool)

    def _grow(self, pool: Pool, size: int) -> Block | None:
        page = SMALL_BUFFER if pool.is_small else LARGE_BUFFER
        tail = pool.tail
        have = tail.size if tail is not None and tail.is_free else 0
        extra = (size - have + page - 1) // page * page
        if not self._reserve(extra):
            return None
        if tail is None:
            self._high_address -= 1 << 42
            pool.tail = Block(self._high_address, extra, pool)
            return pool.tail
        if have:
            pool.remove(tail)
            tail.size += extra
            return tail
        block = Block(tail.address + tail.size, extra, pool)
        block.previous, tail.next, pool.tail = tail, block, block
        return block

    def _unmap(self, pool: Pool, block: Block) -> None:
        # only whole pages inside the block go back; a hole in the middle stays addressable, so it
        # is modelled as given back only at the segment's tail, where growing starts again
        page = SMALL_BUFFER if pool.is_small else LARGE_BUFFER
        if block is not pool.tail:
            return
        given = block.size // page * page
        if given == 0:
            return
        pool.remove(block)
        self.reserved_bytes -= given
        block.size -= given
        if block.size:
            pool.insert(block)
            return
        pool.tail = block.previous
        if block.previous is not None:
            block.previous.next = None

    # ---- blocks ----------------------------------------------------------------------------
    def _hand_out(self, block: Block, size: int) -> Block:
        remaining = block.size - size
        pool = block.pool
        split = (
            remaining >= MIN_BLOCK if pool.is_small or self.expandable else (remaining > SMALL_SIZE)
        )
        if split:
            pool.split(block, size)
        block.allocated = True
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block
