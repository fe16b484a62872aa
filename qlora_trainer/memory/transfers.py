"""Copies as foresight sees them: host buffers outside the card, every copy counted.

The schedule is that of the step's own parts (`training/offload.py`, `base/layer_stream.py`,
`base/host_head.py`, `base/host_embedding.py`), run on weightless tensors. Only what a weightless
tensor cannot know is added: which buffers are the host's, how many of them are alive at one time,
and how many bytes each copy moves.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from qlora_trainer.base.transfers import Copy, Transfers
from qlora_trainer.memory.log import EMPTY_CACHE
from qlora_trainer.memory.tracker import AllocationTracker

_INPUTS = "offloaded layer inputs"


def pinned_bytes(size_bytes: int) -> int:
    """Host memory a pinned tensor takes: torch rounds each up to a power of two.

    Source: `CachingHostAllocatorImpl::allocate`, aten/src/ATen/core/CachingHostAllocator.h.

    >>> pinned_bytes(3 * 2**20) // 2**20, pinned_bytes(4096), pinned_bytes(0)
    (4, 4096, 0)
    """
    return 1 << (size_bytes - 1).bit_length() if size_bytes > 0 else 0


class WatchedTransfers(Transfers):
    """Transfers of a simulated step.

    Args:
        tracker: Books host buffers apart, and counts the copies.
        what: Component of what is copied.

    Attributes:
        most_bytes: The most host bytes alive at one time, in buffers or to compute there.
        moved_bytes: Copied, both ways together, since `taken` was last asked.
    """

    def __init__(self, tracker: AllocationTracker, what: str = _INPUTS) -> None:
        super().__init__(torch.device("meta"))
        self._tracker, self._what = tracker, what
        self._alive_bytes = self.most_bytes = self.moved_bytes = 0

    def host_buffer(self, size_bytes: int) -> Tensor:
        """A weightless buffer that is not on the card."""
        buffer = super().host_buffer(size_bytes)
        self._tracker.move_to_host(buffer)
        self._tracker.tag(buffer, self._what)
        taken = pinned_bytes(size_bytes)
        self._alive_bytes += taken
        self.most_bytes = max(self.most_bytes, self._alive_bytes)
        weakref.finalize(buffer.untyped_storage(), self._gone, taken)
        return buffer

    def to_device(
        self, pieces: list[Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> tuple[Tensor, Copy]:
        """A weightless tensor of the card, under its own name."""
        tensor, copy = super().to_device(pieces, shape, dtype)
        if self._what != _INPUTS:  # which are booked with the layers computed again
            self._tracker.tag(tensor, self._what)
        return tensor, copy

    def compute_on_host(self, compute: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        """All that is made on the way is the host's, but for the result."""
        made = self._tracker.log.allocations
        first = len(made)
        result = compute(self._copied(given, back=False))
        for allocation in made[first:]:
            allocation.on_host = True
        size_bytes = sum(allocation.size_bytes for allocation in made[first:])
        self.most_bytes = max(self.most_bytes, size_bytes)
        return self._copied(result, back=True)

    def give_back(self) -> None:
        """Log it."""
        self._tracker.mark(EMPTY_CACHE)

    def taken(self) -> int:
        """What was copied since this was last asked."""
        moved_bytes, self.moved_bytes = self.moved_bytes, 0
        return moved_bytes

    def _gone(self, size_bytes: int) -> None:
        self._alive_bytes -= size_bytes

    def move(self, pieces: list[Tensor], flat: Tensor, *, back: bool) -> None:
        """Copy, and count it under its direction."""
        self._count(flat.nbytes, back=back)
        super().move(pieces, flat, back=back)

    def _copied(self, tensor: Tensor, *, back: bool) -> Tensor:
        self._count(tensor.nbytes, back=back)
        return tensor.to(self.device, copy=True)

    def _count(self, size_bytes: int, *, back: bool) -> None:
        self._tracker.count_kernel(f"copy to {'the card' if back else 'host memory'}")
        self.moved_bytes += size_bytes
