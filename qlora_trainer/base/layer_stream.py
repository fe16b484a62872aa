"""The frozen layers in host memory: one on the device, the next one on its way.

A card smaller than the 4-bit model trains it. Each layer's frozen tensors wait in pinned host
memory as one flat buffer. When a layer begins, its buffer is on the device and the copy of the one
that comes next starts: the layer above in the forward, the layer below while the backward computes
the layers again. Two buffers then, one in use and one being filled; what has been used is dropped
before the next is allocated. Adapters, optimizer, embeddings and head stay where they are. The
bits are the same, and so are losses and gradients. How copies are made, and why no block is reused
under one, is `base/transfers.py`'s.

A layer's parameters and buffers are views into its flat buffer while it is there. Away, they are
placeholders of the same shape, dtype and device that hold one NaN: what is read at the wrong time
cannot pass for a weight. The layer's forward is wrapped on the instance; transformers computes a
layer again inside that forward, so whoever plans this (`training/activations.py`) puts `bringing`
around what is computed again.

Given up: keeping the activations of a streamed layer, whose backward would find its weights gone
(the run file refuses it), and training its own weights in full.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.base.layers import decoder_layers
from qlora_trainer.base.transfers import Copy, Transfers, piece_sizes
from qlora_trainer.errors import UserError

_ALIGNMENT = 512  # bytes, as the allocator's own
_BRING = "_bring_to_the_device"


@dataclass(frozen=True)
class _Slot:
    """One tensor of a layer, and where it lies in the flat buffer."""

    owner: nn.Module
    name: str
    first: int
    shape: torch.Size
    dtype: torch.dtype

    def put(self, tensor: Tensor) -> None:
        """Let the module find `tensor` under its name."""
        parameter = self.owner._parameters.get(self.name)
        if parameter is None:
            self.owner._buffers[self.name] = tensor
        else:
            parameter.data = tensor  # the same parameter: others may share the object

    def view(self, flat: Tensor) -> Tensor:
        """This tensor's part of the flat buffer."""
        size_bytes = self.shape.numel() * self.dtype.itemsize
        return flat[self.first : self.first + size_bytes].view(self.dtype).view(self.shape)

    def placeholder(self, device: torch.device) -> Tensor:
        """What stands there while the layer is away: no memory to speak of."""
        value = float("nan") if self.dtype.is_floating_point else 0
        return torch.full((), value, dtype=self.dtype, device=device).expand(self.shape)


class _Layer:
    """The frozen tensors of one layer."""

    def __init__(self, layer: nn.Module, transfers: Transfers) -> None:
        self.slots: list[_Slot] = []
        first, tensors = 0, []
        for owner in layer.modules():
            own = (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
            for name, tensor in own:
                self.slots.append(_Slot(owner, name, first, tensor.shape, tensor.dtype))
                tensors.append(tensor.detach())
                first += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.size_bytes = first
        place = torch.device("meta" if transfers.device.type == "meta" else "cpu")
        flat = torch.empty(first, dtype=torch.uint8, device=place)
        for slot, tensor in zip(self.slots, tensors, strict=True):
            slot.view(flat).copy_(tensor)
        self.pieces = [transfers.host_buffer(size) for size in piece_sizes(first)]
        transfers.move(self.pieces, flat, back=False)
        self.away = [slot.placeholder(transfers.device) for slot in self.slots]
        self.coming: tuple[Tensor, Copy] | None = None
        self.here = False
        self.leave(force=True)

    def start(self, transfers: Transfers) -> None:
        """Begin its copy to the device, unless it is there or on its way."""
        if not self.here and self.coming is None:
            size = torch.Size((self.size_bytes,))
            self.coming = transfers.to_device(self.pieces, size, torch.uint8)

    def arrive(self, transfers: Transfers) -> None:
        """Have it on the device."""
        self.start(transfers)
        if self.coming is None:
            return
        (flat, copy), self.coming = self.coming, None
        copy.wait()
        for slot in self.slots:
            slot.put(slot.view(flat))
        self.here = True

    def leave(self, *, force: bool = False) -> None:
        """Let its device memory go."""
        self.coming = None
        if self.here or force:
            for slot, placeholder in zip(self.slots, self.away, strict=True):
                slot.put(placeholder)
        self.here = False


class LayerStream:
    """The layers of a model, each on the device when it computes.

    Args:
        layers: In the order they run.
        transfers: Buffers and copies; another may be put in its place.

    Attributes:
        transfers: As given.
        names: Of all streamed tensors, as the model had them.
    """

    def __init__(self, layers: Sequence[tuple[str, nn.Module]], transfers: Transfers) -> None:
        self.transfers = transfers
        self.names = frozenset(
            f"{path}.{name}"
            for path, layer in layers
            for name, _ in (*layer.named_parameters(), *layer.named_buffers())
        )
        self._last = 0
        self._layers: list[_Layer] = []
        for index, (_, layer) in enumerate(layers):
            self._layers.append(_Layer(layer, transfers))
            self._bring_before(layer, index)

    @property
    def host_bytes(self) -> int:
        """Pinned memory that the layers take."""
        return sum(piece.nbytes for layer in self._layers for piece in layer.pieces)

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
        self._layers[index].arrive(self.transfers)
        self._layers[following].start(self.transfers)

    def _bring_before(self, layer: nn.Module, index: int) -> None:
        layer.__dict__[_BRING] = functools.partial(self.bring, index)
        layer.forward = bringing(layer, layer.forward)


def bringing(layer: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a layer that has its weights on the device first, where they come and go."""
    bring: Callable[[], None] | None = layer.__dict__.get(_BRING)
    if bring is None:
        return function

    def brought(*args: Any, **kwargs: Any) -> Any:
        bring()
        return function(*args, **kwargs)

    return brought


def streamed_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that can be streamed, by path.

    Raises:
        UserError: The model has no stack of layers, or layers share weights.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UserError(
            f"model.stream_layers = true: {type(model).__name__} has no stack of layers; "
            "set model.stream_layers: false"
        )
    paths = tuple(f"{path}." for path, _ in layers)
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = next((path for path in paths if name.startswith(path)), name)
        owners.setdefault(id(parameter), set()).add(owner)
    inside = {id(p) for _, layer in layers for p in layer.parameters()}
    if any(len(found) > 1 for key, found in owners.items() if key in inside):
        raise UserError(
            f"model.stream_layers = true: layers of {type(model).__name__} share weights with "
            "others, which cannot come and go with one of them; set model.stream_layers: false"
        )
    return layers


def stream_of(model: nn.Module) -> LayerStream | None:
    """The stream of a model's layers; None where all of it is on the device."""
    found = getattr(model, "layer_stream", None)
    return found if isinstance(found, LayerStream) else None
