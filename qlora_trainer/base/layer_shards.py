"""The frozen layers in parts: each of several processes holds its part of every layer.

A model that no single card holds trains on several (ZeRO stage 3: Rajbhandari et al. 2020,
arXiv:1910.02054; over a 4-bit base: Answer.AI, "You can now train a 70b language model at home",
2024). Each layer is one flat parameter of bytes that torch's `fully_shard` (FSDP2) cuts into as
many parts as there are processes; its `unshard` gathers them into a buffer and copies that to its
place, its `reshard` frees it. When, is `base/layer_stream.py`'s: two layers at most are whole.
FSDP2 moves bytes as they are, so codes need not be held in the compute dtype
(`bnb_4bit_quant_storage`) as FSDP1's flat parameters had to be.

fully_shard's own hooks are not used. They gather whenever a layer runs, and wait for ever where the
others do not run it: shares of unlike number, rows written one by one, a step tried again in one
process. Here all processes meet before each gathering (`Peers.meet`), and whoever has nothing to
compute, or another layer, takes part all the same (`join`). What fails in one is heard there.

Given up: sharding embeddings and head. `model.embeddings_on_host` and `model.head_bits` take those
off the card, which no gathering does while they are used.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from qlora_trainer.base.layer_buffer import LayerBuffer
from qlora_trainer.base.layer_stream import Waiting

SETTING = "model.shard_layers"


class Peers(Protocol):
    """The processes that share the layers."""

    @property
    def count(self) -> int:
        """How many there are."""

    def meet(self, layer: int) -> None:
        """Return when all are about to gather this layer; take part in others until then."""

    def serve(self, join: Callable[[int], None]) -> None:
        """Call `join` whenever another process gathers a layer."""

    def linked(self) -> AbstractContextManager[None]:
        """Within, a peer that is gone is told as such."""


class ShardStore:
    """The layers' parts on this process' device and on those of its peers.

    Args:
        device: Where this process computes.
        peers: Those that hold the other parts.

    Attributes:
        watch: Told of the number of a layer and its size where it has become whole, 0 where it is
            in parts again.
    """

    setting = SETTING

    def __init__(self, device: torch.device, peers: Peers) -> None:
        self.device, self._peers = device, peers
        self.watch: Callable[[int, int], None] = lambda _layer, _size: None
        from torch.distributed.device_mesh import init_device_mesh

        self._mesh = init_device_mesh(device.type, (peers.count,))
        self._layers: list[_InParts] = []
        weak = weakref.WeakMethod(self.join)  # the model may go before the processes part

        def join(layer: int) -> None:
            found = weak()
            if found is None:
                raise RuntimeError(f"layer {layer} is asked for, and this process has let it go")
            found(layer)

        peers.serve(join)

    def keep(self, index: int, buffer: LayerBuffer) -> Waiting:
        """Keep this process' part of a layer."""
        whole = buffer.read(self.device, unit_bytes=self._peers.count)
        layer = _InParts(index, whole, self._mesh, self._peers, self)
        self._layers.append(layer)
        return layer

    def parts(self) -> list[Tensor]:
        """What is held here of every layer."""
        return [layer.part for layer in self._layers]

    def whole(self) -> dict[int, int]:
        """Number -> bytes of the layers that are whole here."""
        return {i: layer.size_bytes for i, layer in enumerate(self._layers) if layer.here}

    def gather_each(self) -> None:
        """Make every layer whole once; all processes do it together."""
        for layer in self._layers:
            if not layer.here and not layer.coming:
                layer.start()
                layer.arrive()
                layer.leave()

    def join(self, index: int) -> None:
        """Gather a layer that another process has use for."""
        self._layers[index].join()


class _Part(nn.Module):
    """What `fully_shard` is put on; nobody calls it, so none of its hooks runs."""

    def __init__(self, flat: Tensor) -> None:
        super().__init__()
        self.flat = nn.Parameter(flat, requires_grad=False)


class _InParts:
    """One layer's flat buffer, in parts."""

    def __init__(
        self, index: int, whole: Tensor, mesh: Any, peers: Peers, store: ShardStore
    ) -> None:
        from torch.distributed.fsdp import fully_shard  # half a second that other runs save

        self._index, self.size_bytes, self._peers = index, whole.numel(), peers
        self._store = store
        # Gathered again by us alone: also not after a forward that never comes.
        shared = fully_shard(_Part(whole), mesh=mesh, reshard_after_forward=False)
        self._held = cast(Any, shared)  # it has both classes' attributes
        self.part: Tensor = self._held.flat.to_local()
        self._coming: Any = None
        self.here = False

    @property
    def coming(self) -> bool:
        """Whether it is being gathered."""
        return self._coming is not None

    def start(self) -> None:
        # What gathering needs is allocated once before: nobody waits for one that has no room.
        torch.empty(self.size_bytes, dtype=torch.uint8, device=self.part.device)
        self._peers.meet(self._index)
        self._gather()

    def _gather(self) -> None:
        with self._peers.linked():
            self._coming = self._held.unshard(async_op=True)

    def arrive(self) -> Tensor:
        with self._peers.linked():
            self._coming.wait()
        self._coming, self.here = None, True
        self._store.watch(self._index, self.size_bytes)
        flat: Tensor = self._held.flat.detach()
        return flat

    def leave(self) -> None:
        if self.coming:  # others have it on its way as well: it is not taken back
            self.arrive()
        if self.here:
            self._held.reshard()
            self._store.watch(self._index, 0)
        self.here = False

    def join(self) -> None:
        """Gather it for another; what is here stays, its views included."""
        was_coming, was_here = self.coming, self.here
        self.leave()
        self._gather()
        if not was_coming:
            self.arrive()
            if not was_here:
                self.leave()


class WeightlessShards:
    """The same on `meta`, for foresight: the allocations that `fully_shard` makes, and no peers.

    Args:
        count: How many processes there are.

    Attributes:
        watch: Told of every tensor that is made.
        received_bytes: From the other processes, so far.
        shard_bytes: Of all parts held here.
    """

    setting = SETTING

    def __init__(self, count: int) -> None:
        self.device = torch.device("meta")
        self.count = count
        self.watch: Callable[[Tensor], None] = lambda _tensor: None
        self.received_bytes = self.shard_bytes = 0
        self.shards: list[Tensor] = []

    def keep(self, index: int, buffer: LayerBuffer) -> Waiting:
        """A part of a layer, weightless."""
        part_bytes = buffer.read(self.device, unit_bytes=self.count).numel() // self.count
        self.shards.append(torch.empty(part_bytes, dtype=torch.uint8, device=self.device))
        self.shard_bytes += part_bytes
        return _WeightlessParts(self, part_bytes)


class _WeightlessParts:
    def __init__(self, store: WeightlessShards, part_bytes: int) -> None:
        self._store, self._part_bytes = store, part_bytes
        self._coming: Tensor | None = None

    def _whole(self) -> Tensor:
        store = self._store
        whole = torch.empty(self._part_bytes * store.count, dtype=torch.uint8, device=store.device)
        store.watch(whole)
        return whole

    def start(self) -> None:
        self._store.received_bytes += self._part_bytes * (self._store.count - 1)
        self._coming = self._whole()

    def arrive(self) -> Tensor:
        flat = self._whole()  # where it is copied to; what was gathered goes
        self._coming = None
        return flat

    def leave(self) -> None:
        self._coming = None
