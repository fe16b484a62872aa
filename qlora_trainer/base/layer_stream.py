"""The frozen layers elsewhere: one on the device, the next one on its way.

A card smaller than the 4-bit model trains it. Each layer's frozen tensors are one flat buffer
(`base/layer_buffer.py`) that waits in pinned host memory, or in parts on the cards of several
processes (`base/layer_shards.py`). When a layer begins, its buffer is on the device and the copy of
the one that comes next starts: the layer above in the forward, the layer below while the backward
computes the layers again. Two buffers then, one in use and one being filled; what has been used is
dropped before the next is allocated. Adapters, optimizer, embeddings and head stay where they are.
The bits are the same, and so are losses and gradients. How copies to and from the host are made,
and why no block is reused under one, is `base/transfers.py`'s.

The layer's forward is wrapped on the instance; transformers computes a layer again inside that
forward, so whoever plans this (`training/activations.py`) puts `bringing` around what is computed
again.

Given up: keeping the activations of a streamed layer, whose backward would find its weights gone
(the run file refuses it), and training its own weights in full.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlora_trainer.base.layer_buffer import LayerBuffer
from qlora_trainer.base.layers import decoder_layers
from qlora_trainer.base.transfers import Copy, Transfers, piece_sizes
from qlora_trainer.errors import UserError

_BRING = "_bring_to_the_device"


class Waiting(Protocol):
    """One layer's flat buffer while it is elsewhere."""

    def start(self) -> None:
        """Begin to bring it."""

    def arrive(self) -> Tensor:
        """The buffer on the device, once it is all there; after `start`."""

    def leave(self) -> None:
        """Let its device memory go, also where it is on its way."""


class Store(Protocol):
    """Where the layers wait.

    Attributes:
        setting: That asks for it.
        device: Where they compute.
    """

    setting: str
    device: torch.device

    def keep(self, index: int, buffer: LayerBuffer) -> Waiting:
        """Take over the tensors of a layer."""


class HostStore:
    """Pinned host memory.

    Args:
        transfers: Buffers and copies; another may be put in its place.
    """

    setting = "model.stream_layers"

    def __init__(self, transfers: Transfers) -> None:
        self.transfers, self.device = transfers, transfers.device
        self.host_bytes = 0

    def keep(self, index: int, buffer: LayerBuffer) -> Waiting:
        """Copy a layer to the host."""
        flat = buffer.read(torch.device("meta" if self.device.type == "meta" else "cpu"))
        pieces = [self.transfers.host_buffer(size) for size in piece_sizes(flat.numel())]
        self.transfers.move(pieces, flat, back=False)
        self.host_bytes += sum(piece.nbytes for piece in pieces)
        return _OnHost(self, pieces, flat.shape)


class _OnHost:
    def __init__(self, store: HostStore, pieces: list[Tensor], shape: torch.Size) -> None:
        self._store, self._pieces, self._shape = store, pieces, shape
        self._coming: tuple[Tensor, Copy] | None = None

    def start(self) -> None:
        self._coming = self._store.transfers.to_device(self._pieces, self._shape, torch.uint8)

    def arrive(self) -> Tensor:
        assert self._coming is not None
        (flat, copy), self._coming = self._coming, None
        copy.wait()
        return flat

    def leave(self) -> None:
        self._coming = None


class _Layer:
    """One layer, and where it is."""

    def __init__(self, layer: nn.Module, index: int, store: Store) -> None:
        self._buffer = LayerBuffer(layer, store.device)
        self.waiting = store.keep(index, self._buffer)
        self.here = self.coming = False
        self._buffer.put_away()

    def start(self) -> None:
        """Begin its way to the device, unless it is there or on it."""
        if not self.here and not self.coming:
            self.waiting.start()
            self.coming = True

    def arrive(self) -> None:
        """Have it on the device."""
        self.start()
        if self.coming:
            self._buffer.put(self.waiting.arrive())
            self.here, self.coming = True, False

    def leave(self) -> None:
        """Let its device memory go."""
        if self.here:
            self._buffer.put_away()
        self.here = self.coming = False
        self.waiting.leave()


class LayerStream:
    """The layers of a model, each on the device when it computes.

    Args:
        store: Where they wait.

    Attributes:
        store: As given.
        names: Of all streamed tensors, as the model had them, with the number of their layer.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.names: dict[str, int] = {}
        self._last = 0
        self._layers: list[_Layer] = []

    def add(self, path: str, layer: nn.Module) -> None:
        """Take over the next layer, in the order they run; all is as it shall stay."""
        index = len(self._layers)
        own = (*layer.named_parameters(), *layer.named_buffers())
        self.names |= {f"{path}.{name}": index for name, _ in own}
        self._layers.append(_Layer(layer, index, self.store))
        layer.__dict__[_BRING] = functools.partial(self.bring, index)
        layer.forward = bringing(layer, layer.forward)

    @property
    def present(self) -> list[int]:
        """Numbers of the layers on the device or on their way there."""
        return [i for i, layer in enumerate(self._layers) if layer.here or layer.coming]

    def bring(self, index: int) -> None:
        """Have a layer on the device, the next one on its way, and no other."""
        if index == self._last and self._layers[index].here:
            return
        top = len(self._layers) - 1
        upward = index == 0 or (index != top and index > self._last)
        self._last = index
        following = min(max(index + (1 if upward else -1), 0), top)
        for present in self.present:
            if present not in (index, following):
                self._layers[present].leave()
        self._layers[index].arrive()
        self._layers[following].start()


def bringing(layer: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a layer that has its weights on the device first, where they come and go."""
    bring: Callable[[], None] | None = layer.__dict__.get(_BRING)
    if bring is None:
        return function

    def brought(*args: Any, **kwargs: Any) -> Any:
        bring()
        return function(*args, **kwargs)

    return brought


def streamed_layers(
    model: nn.Module, setting: str = HostStore.setting
) -> list[tuple[str, nn.Module]]:
    """The layers that can be streamed, by path.

    Args:
        model: Its layers as transformers made them.
        setting: That asks for it.

    Raises:
        UserError: The model has no stack of layers, or layers share weights.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UserError(
            f"{setting} = true: {type(model).__name__} has no stack of layers; set {setting}: false"
        )
    paths = tuple(f"{path}." for path, _ in layers)
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = next((path for path in paths if name.startswith(path)), name)
        owners.setdefault(id(parameter), set()).add(owner)
    inside = {id(p) for _, layer in layers for p in layer.parameters()}
    if any(len(found) > 1 for key, found in owners.items() if key in inside):
        raise UserError(
            f"{setting} = true: layers of {type(model).__name__} share weights with "
            f"others, which cannot come and go with one of them; set {setting}: false"
        )
    return layers


def stream_of(model: nn.Module) -> LayerStream | None:
    """The stream of a model's layers; None where all of it is on the device."""
    found = getattr(model, "layer_stream", None)
    return found if isinstance(found, LayerStream) else None
