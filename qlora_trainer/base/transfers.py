"""Copies between a device and pinned host memory, on a stream of their own where there is one.

On any device without streams the same schedule runs with plain copies. Every block is allocated on
the compute stream; that stream waits for a copy's event before a block's last reference goes, so
nothing is reused under a running copy and the allocator needs no `record_stream`.

torch's pinned allocator rounds every request up to a power of two (CachingHostAllocator), so a
tensor is stored in pieces whose sizes are such powers; the loss is below 1 MiB a tensor.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.errors import UserError, first_line
from qlora_trainer.units import format_bytes

_SMALLEST_PIECE = 2**20


def piece_sizes(size_bytes: int) -> list[int]:
    """Powers of two that together hold `size_bytes`, largest first.

    >>> [size // 2**20 for size in piece_sizes(11 * 2**20 + 1)]
    [8, 2, 1, 1]
    """
    sizes: list[int] = []
    left = size_bytes
    while left > _SMALLEST_PIECE:
        sizes.append(1 << (left.bit_length() - 1))
        left -= sizes[-1]
    return [*sizes, _SMALLEST_PIECE] if left else sizes


def pinned_bytes(size_bytes: int) -> Tensor:
    """Bytes of host memory that a card may copy by itself.

    Raises:
        UserError: The driver gives none. torch then says that CUDA is out of memory, though no
            card is; under WSL it may be so long before the RAM is used up.
    """
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        raise UserError(
            f"the driver gives no further {format_bytes(size_bytes)} of pinned host memory "
            f"({first_line(error)}). Do without: model.stream_layers: false, "
            "model.head_on_host: false, train.activations: recompute; under WSL and in containers "
            "the limit is theirs (`memory` in .wslconfig; `ulimit -l`)"
        ) from error


class Copy:
    """A copy under way; `wait` before touching its result or dropping its source.

    Args:
        source: Kept until the copy is over.
        event: Its end; None where it is over already.
        device: Whose compute stream waits, be it the process's current device or not.
    """

    def __init__(self, source: Any, event: "torch.cuda.Event | None", device: torch.device) -> None:
        self._source, self._event, self._device = source, event, device

    def wait(self) -> None:
        """Let the compute stream go on only after the copy, and let the source go."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
        self._source = self._event = None

    def __del__(self) -> None:
        # A step broken off must not leave a copy writing into a block that is reused.
        if self._event is not None:
            self.wait()


class Transfers:
    """Host buffers of one device, and the copies to and fro.

    Args:
        device: Where the model computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def host_buffer(self, size_bytes: int) -> Tensor:
        """Bytes in host memory, pinned where the device copies by itself."""
        if self.device.type == "cuda":
            return pinned_bytes(size_bytes)
        place = self.device if self.device.type == "meta" else torch.device("cpu")
        return torch.empty(size_bytes, dtype=torch.uint8, device=place)

    def to_host(self, tensor: Tensor) -> tuple[list[Tensor], Copy]:
        """Begin to copy a contiguous tensor into new host buffers."""
        flat = tensor.view(-1).view(torch.uint8)
        pieces = [self.host_buffer(size) for size in piece_sizes(flat.numel())]
        return pieces, self._copy(pieces, flat, back=False)

    def to_device(
        self, pieces: list[Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> tuple[Tensor, Copy]:
        """Begin to copy host buffers into a new tensor."""
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        return tensor, self._copy(pieces, tensor.view(-1).view(torch.uint8), back=True)

    def compute_on_host(self, compute: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        """What comes of computing on the host with a device tensor, on the device again.

        It waits for both copies, of memory that is not pinned; on a CPU there are none.
        """
        place = self.device if self.device.type == "meta" else torch.device("cpu")
        return compute(given.to(place)).to(given.device)

    def give_back(self) -> None:
        """Return what the device's allocator keeps for later use; the next to ask waits for it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _copy(self, pieces: list[Tensor], flat: Tensor, *, back: bool) -> Copy:
        if self._stream is None:
            self.move(pieces, flat, back=back)
            return Copy(flat, None, self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self.move(pieces, flat, back=back)
            event = torch.cuda.Event()
            event.record(self._stream)
        return Copy(flat, event, self.device)

    def move(self, pieces: list[Tensor], flat: Tensor, *, back: bool) -> None:
        """Copy between host pieces and the bytes of a device tensor."""
        first = 0
        for piece in pieces:
            part = flat[first : first + piece.numel()]
            first += piece.numel()
            host = piece[: part.numel()]
            (part if back else host).copy_(host if back else part, non_blocking=True)
