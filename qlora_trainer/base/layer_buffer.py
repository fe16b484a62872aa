"""The frozen tensors of one layer as one flat buffer, and what stands in their places without it.

The layer's parameters and buffers are views into the flat buffer while it is there. Away, they are
placeholders of the same shape, dtype and device that hold one NaN: what is read at the wrong time
cannot pass for a weight.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_ALIGNMENT = 512  # bytes, as the allocator's own


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


class LayerBuffer:
    """Where each frozen tensor of a layer lies.

    Args:
        layer: As it stands; nothing else may have been put on it.
        device: Where it computes.

    Attributes:
        size_bytes: Of the flat buffer.
    """

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self._slots: list[_Slot] = []
        first = 0
        for owner in layer.modules():
            own = (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
            for name, tensor in own:
                self._slots.append(_Slot(owner, name, first, tensor.shape, tensor.dtype))
                first += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.size_bytes = first
        self._away = [slot.placeholder(device) for slot in self._slots]

    def read(self, place: torch.device, *, unit_bytes: int = 1) -> Tensor:
        """A copy of all of them, in one piece.

        Args:
            place: Where to.
            unit_bytes: The copy's size becomes a multiple of it.

        Returns:
            uint8, of `size_bytes` at least.
        """
        size_bytes = -(-self.size_bytes // unit_bytes) * unit_bytes
        flat = torch.zeros(size_bytes, dtype=torch.uint8, device=place)
        for slot in self._slots:
            found = slot.owner._parameters.get(slot.name)
            tensor = slot.owner._buffers[slot.name] if found is None else found.detach()
            assert tensor is not None
            slot.view(flat).copy_(tensor)
        return flat

    def put(self, flat: Tensor) -> None:
        """Let the layer find its tensors in the flat buffer."""
        for slot in self._slots:
            slot.put(slot.view(flat))

    def put_away(self) -> None:
        """Let the layer find placeholders."""
        for slot, placeholder in zip(self._slots, self._away, strict=True):
            slot.put(placeholder)
