"""Blocks of memory as neighbours in a segment, and the pools that hold the free ones.

Which block is taken, and when one is split, is `allocator.py`'s to say.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator


class Block:
    """A piece of a segment; neighbours are linked so that free ones merge."""

    __slots__ = ("address", "allocated", "events", "next", "pool", "previous", "size", "uses")

    def __init__(self, address: int, size: int, pool: "Pool") -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.allocated = False
        self.previous: Block | None = None
        self.next: Block | None = None
        self.uses: set[int] = set()
        self.events = 0

    @property
    def is_free(self) -> bool:
        """Neither handed out nor waiting for the event of another stream."""
        return not self.allocated and self.events == 0


class Pool:
    """Free blocks of one kind and stream, ordered by size, then address (`BlockComparatorSize`)."""

    __slots__ = ("_keys", "blocks", "is_small", "tail")

    def __init__(self, is_small: bool) -> None:
        self.is_small = is_small
        self._keys: list[tuple[int, int]] = []
        self.blocks: dict[tuple[int, int], Block] = {}
        self.tail: Block | None = None  # last block of the expandable segment

    def insert(self, block: Block) -> None:
        """Make `block` available."""
        key = (block.size, block.address)
        insort(self._keys, key)
        self.blocks[key] = block

    def remove(self, block: Block) -> None:
        """Take `block` out, to use, merge or release it."""
        key = (block.size, block.address)
        del self._keys[bisect_left(self._keys, key)]
        del self.blocks[key]

    def best_fit(self, size: int) -> Block | None:
        """The smallest free block of at least `size`."""
        position = bisect_left(self._keys, (size, 0))
        return self.blocks[self._keys[position]] if position < len(self._keys) else None

    def split(self, block: Block, size: int) -> None:
        """Cut `block`, which is not in the pool, to `size`; the rest becomes available."""
        rest = Block(block.address + size, block.size - size, self)
        rest.previous, rest.next = block, block.next
        if block.next is not None:
            block.next.previous = rest
        block.next = rest
        block.size = size
        if self.tail is block:
            self.tail = rest
        self.insert(rest)

    def give_back(self, block: Block) -> None:
        """Make `block` available, as one with its free neighbours (`try_merge_blocks`)."""
        before, after = block.previous, block.next
        if before is not None and before.is_free:
            self.remove(before)
            block.address = before.address
            block.size += before.size
            block.previous = before.previous
            if block.previous is not None:
                block.previous.next = block
        if after is not None and after.is_free:
            self.remove(after)
            block.size += after.size
            block.next = after.next
            if block.next is not None:
                block.next.previous = block
            if self.tail is after:
                self.tail = block
        self.insert(block)

    def __iter__(self) -> Iterator[Block]:
        return iter([self.blocks[key] for key in self._keys])
