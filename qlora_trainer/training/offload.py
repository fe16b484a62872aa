"""Layer inputs in host memory while nobody needs them, and back on the device ahead of need.

A recomputed layer keeps its inputs alone: the hidden states, and what else it is given by position
(a decoder's states of the encoder). Here they go to (pinned) host memory while the layer computes,
and their device blocks are free for reuse when the next layer begins. In the backward, asking for
one layer's inputs starts the copies of the next one below: two sets of buffers, one in use and one
being filled. What several layers share leaves once, comes back once and then stays until the last
of them has had it. How copies are made, and why no block is reused under one, is
`base/transfers.py`'s. A bf16 copy is exact: gradients are those of a kept layer, bit for bit.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qlora_trainer.base.transfers import Copy, Transfers


class _Stored:
    """An input of one or several layers: kept on the device, or in host memory.

    Attributes:
        uses: How many layers are still to take it.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.source = weakref.ref(tensor.untyped_storage())
        self.uses = 0
        self.kept: Tensor | None = None
        self.pieces: list[Tensor] = []
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.coming: tuple[Tensor, Copy] | None = None


class _Layer:
    """The inputs of one layer's run; knows the run before it."""

    def __init__(self, before: "_Layer | None") -> None:
        self.before = None if before is None else weakref.ref(before)
        self.inputs: list[_Stored] = []


class Offload:
    """Checkpointed layers whose inputs wait in host memory; one object for a model's layers.

    Args:
        transfers: Buffers and copies.
    """

    def __init__(self, transfers: Transfers) -> None:
        self.transfers = transfers
        self._last: weakref.ref[_Layer] | None = None
        self._known: weakref.WeakValueDictionary[Any, _Stored] = weakref.WeakValueDictionary()
        self._leaving: list[Copy] = []

    def layer(self, *, to_host: bool) -> Callable[..., Any]:
        """What runs one layer: as `torch.utils.checkpoint`, but for where its inputs wait.

        Args:
            to_host: Otherwise they stay, and only start the next copies below.
        """

        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            layer = _Layer(None if self._last is None else self._last())

            def pack(tensor: Tensor) -> Any:
                return self._pack(layer, tensor, to_host=to_host)

            with saved_tensors_hooks(pack, self._unpack):
                return checkpoint(
                    function, *args, use_reentrant=False, preserve_rng_state=True, **kwargs
                )

        return run

    def _pack(self, layer: _Layer, tensor: Tensor, *, to_host: bool) -> Any:
        if not tensor.is_floating_point():
            return tensor  # positions and the like: small
        if not layer.inputs:
            self._arrived()
            self._last = weakref.ref(layer)
        stored = self._store(tensor, to_host=to_host)
        stored.uses += 1
        layer.inputs.append(stored)
        return layer, stored

    def _store(self, tensor: Tensor, *, to_host: bool) -> _Stored:
        """Keep a tensor or let it leave, unless an earlier layer did."""
        storage = tensor.untyped_storage()
        view = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        key = (storage._cdata, *view, tensor._version)
        known = self._known.get(key)
        if known is not None and known.source() is storage:  # not a later one at its address
            return known
        stored = self._known[key] = _Stored(tensor)
        if to_host and tensor.is_contiguous():
            stored.pieces, copy = self.transfers.to_host(tensor.detach())
            self._leaving.append(copy)
        else:
            stored.kept = tensor
        return stored

    def _arrived(self) -> None:
        while self._leaving:
            self._leaving.pop().wait()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        layer, stored = packed
        assert isinstance(layer, _Layer)
        self._arrived()
        self._call_back(layer)
        tensor = self._take(stored)
        below = None if layer.before is None else layer.before()
        if below is not None:
            self._call_back(below)
        return tensor

    def _call_back(self, layer: _Layer) -> None:
        """Begin to copy what a layer is still to take."""
        for stored in layer.inputs:
            if stored.uses > 0:
                self._fetch(stored)

    def _take(self, stored: _Stored) -> Tensor:
        if stored.kept is not None:
            return stored.kept
        self._fetch(stored)  # in a second backward nothing comes ahead
        assert stored.coming is not None
        tensor, copy = stored.coming
        stored.uses -= 1
        if stored.uses <= 0:
            stored.coming = None
        copy.wait()
        return tensor

    def _fetch(self, stored: _Stored) -> None:
        if stored.kept is None and stored.coming is None:
            transfers = self.transfers
            stored.coming = transfers.to_device(stored.pieces, stored.shape, stored.dtype)
