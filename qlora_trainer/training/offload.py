"""Layer inputs in host memory while nobody needs them, and back on the device ahead of need.

A recomputed layer keeps its input alone. Here that input goes to (pinned) host memory while the
layer computes, and its device block is free for reuse when the next layer begins. In the backward,
asking for one layer's input starts the copy of the next one below: two buffers, one in use and one
being filled. Copies run on a stream of their own on CUDA; on any other device the same schedule
runs with plain copies.

Every block is allocated on the compute stream; that stream waits for a copy's event before a
block's last reference goes, so nothing is reused under a running copy and the allocator needs no
`record_stream`. A bf16 copy is exact: gradients are those of a kept layer, bit for bit.

torch's pinned allocator rounds every request up to a power of two (CachingHostAllocator), so a
tensor is stored in pieces whose sizes are such powers; the loss is below 1 MiB a tensor.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

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
        place = self.device if self.device.type == "meta" else torch.device("cpu")
        pinned = self.device.type == "cuda"
        return torch.empty(size_bytes, dtype=torch.uint8, device=place, pin_memory=pinned)

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


class _Stored:
    """A layer's input: kept on the device, or in host memory; knows the one stored before it."""

    def __init__(self, tensor: Tensor, before: "_Stored | None") -> None:
        self.before = None if before is None else weakref.ref(before)
        self.kept: Tensor | None = None
        self.pieces: list[Tensor] = []
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.coming: tuple[Tensor, Copy] | None = None


class Offload:
    """Checkpointed layers whose inputs wait in host memory; one object for a model's layers.

    Args:
        transfers: Buffers and copies.
    """

    def __init__(self, transfers: Transfers) -> None:
        self.transfers = transfers
        self._last: weakref.ref[_Stored] | None = None
        self._leaving: list[Copy] = []

    def layer(self, *, to_host: bool) -> Callable[..., Any]:
        """What runs one layer: as `torch.utils.checkpoint`, but for where its input waits.

        Args:
            to_host: Otherwise its input stays, and only starts the next copy below.
        """

        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def pack(tensor: Tensor) -> Any:
                return self._pack(tensor, to_host=to_host)

            with saved_tensors_hooks(pack, self._unpack):
                return checkpoint(
                    function, *args, use_reentrant=False, preserve_rng_state=True, **kwargs
                )

        return run

    def _pack(self, tensor: Tensor, *, to_host: bool) -> Any:
        if not tensor.is_floating_point():
            return tensor  # positions and the like: small
        self._arrived()
        before = None if self._last is None else self._last()
        stored = _Stored(tensor, before)
        self._last = weakref.ref(stored)
        if to_host and tensor.is_contiguous():
            stored.pieces, copy = self.transfers.to_host(tensor.detach())
            self._leaving.append(copy)
        else:
            stored.kept = tensor
        return stored

    def _arrived(self) -> None:
        while self._leaving:
            self._leaving.pop().wait()

    def _unpack(self, stored: Any) -> Tensor:
        if isinstance(stored, Tensor):
            return stored
        assert isinstance(stored, _Stored)
        self._arrived()
        if stored.kept is not None:
            tensor = stored.kept
        else:
            self._fetch(stored)
            assert stored.coming is not None
            (tensor, copy), stored.coming = stored.coming, None
            copy.wait()
        below = None if stored.before is None else stored.before()
        if below is not None and below.kept is None:
            self._fetch(below)
        return tensor

    def _fetch(self, stored: _Stored) -> None:
        if stored.coming is None:
            transfers = self.transfers
            stored.coming = transfers.to_device(stored.pieces, stored.shape, stored.dtype)
