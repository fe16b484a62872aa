"""Layer inputs in host memory while nobody needs them, and back on the device ahead of need.

A recomputed layer keeps its input alone. Here that input goes to (pinned) host memory while the
layer computes, and its device block is free for reuse when the next layer begins. In the backward,
asking for one layer's input starts the copy of the next one below: two buffers, one in use and one
being filled. How copies are made, and why no block is reused under one, is `base/transfers.py`'s. A
bf16 copy is exact: gradients are those of a kept layer, bit for bit.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qlora_trainer.base.transfers import Copy, Transfers


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
