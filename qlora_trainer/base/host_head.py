"""The output head in host memory: on the device for the loss, and gone before the backward.

Llama-3.1-8B's head is 1,002 MiB in 16 bit, and only the loss needs it, which computes its gradient
in the forward (`tasks/linear_cross_entropy.py`): while the layers' gradients grow and their weights
are dense, it need not be there. Pinned host memory keeps it, and each pass copies it whole; the
bits are the same, and so are losses and gradients. What asks for it while it is there shares it, so
answering prompts (`head_at_hand`) copies it once and not for every token. The allocator's cache is
given back before it is lent and after: in one piece it fits into no block the layers left, and once
gone, gradients would be put into its block and the next pass find no room there. That costs a wait
for the device and new segments twice a pass (some ms, an estimate) and saves a second head's room.

Given up: hiding the copy behind the layers, for the head would then stand beside one; training it;
fewer bits (`base/head.py`). A table that is both head and token embeddings is held on the host
twice, pinned for the head.

D hidden size, V vocabulary.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qlora_trainer.base.head import plain_head, put_head
from qlora_trainer.base.transfers import Transfers, piece_sizes
from qlora_trainer.errors import UserError

Result = TypeVar("Result")
_SAID = "model.head_on_host = true"
_INSTEAD = "set model.head_on_host: false"


class HostHead(nn.Module):
    """Takes the place of a frozen linear head.

    Args:
        weight: (V, D), where it is now.
        bias: (V,) on the device, or None.
        transfers: Buffers and copies of the device it computes on; another may be put in its place.

    Attributes:
        weight: (V, D) Stands in the weight's place, of its shape, dtype and device, without memory.
        host_bytes: Pinned.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, transfers: Transfers) -> None:
        super().__init__()
        self.bias = bias
        self.out_features, self.in_features = weight.shape
        self._keep(weight.detach(), transfers)

    def _keep(self, weight: Tensor, transfers: Transfers) -> None:
        self.transfers = transfers
        self._pieces = [transfers.host_buffer(size) for size in piece_sizes(weight.nbytes)]
        self.host_bytes = sum(piece.nbytes for piece in self._pieces)
        transfers.move(self._pieces, weight.contiguous().view(-1).view(torch.uint8), back=False)
        unknown = torch.full((), float("nan"), dtype=weight.dtype, device=transfers.device)
        self.weight = nn.Parameter(unknown.expand(weight.shape), requires_grad=False)
        self._here: weakref.ref[Tensor] | None = None

    def dense(self) -> Tensor:
        """(V, D) The weight on the device, for as long as the caller holds it."""
        weight = None if self._here is None else self._here()
        if weight is None:
            shape, dtype = self.weight.shape, self.weight.dtype
            weight, copy = self.transfers.to_device(self._pieces, shape, dtype)
            copy.wait()
            self._here = weakref.ref(weight)
        return weight

    def lend(self, compute: Callable[[Tensor], Result]) -> Result:
        """What comes of computing with the weight, which is on the device meanwhile.

        Args:
            compute: Keeps no reference to it.
        """
        if self._is_away():
            self.transfers.give_back()
        result = compute(self.dense())
        if self._is_away():  # nobody else has it
            self.transfers.give_back()
        return result

    def _is_away(self) -> bool:
        return self._here is None or self._here() is None

    def forward(self, x: Tensor) -> Tensor:
        """Multiply, for whoever calls it as a layer. x: (..., D) -> (..., V)."""
        return nn.functional.linear(x, self.dense(), self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> "HostHead":
        """Follow `model.to(...)`: in another dtype, or ready for another device."""
        held = self.weight
        probe = fn(torch.empty(0, dtype=held.dtype, device=held.device))
        if (probe.dtype, probe.device) != (held.dtype, held.device):
            self._keep(self.dense().to(probe.dtype), Transfers(probe.device))
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias.detach()), requires_grad=False)
        return self

    def extra_repr(self) -> str:
        """What `print(model)` says of this head."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


@contextmanager
def head_at_hand(model: Any) -> Iterator[None]:
    """Hold a head of the host on the device meanwhile, for many passes; others are there anyway."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    held = head.dense() if isinstance(head, HostHead) else None
    try:
        yield
    finally:
        del held


def host_head(model: Any, *, embeddings_on_host: bool) -> Tensor:
    """The head's weight, which may stay on the host.

    Args:
        model: As transformers made it, with weights or on `meta`.
        embeddings_on_host: Token embeddings stay there, so a table tied to the head can.

    Raises:
        UserError: The model has no plain head, or one tied to embeddings the device needs.
    """
    weight = plain_head(model, _SAID, _INSTEAD).weight
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(names) > 1 and not embeddings_on_host:
        raise UserError(
            f"{_SAID}: one weight serves as {' and '.join(names)}, and looking tokens up needs it "
            f"on the device; set model.embeddings_on_host: true beside it, or {_INSTEAD[4:]}"
        )
    return weight


def keep_head_on_host(model: Any, device: torch.device) -> None:
    """Put a `HostHead` in the head's place; all is settled, its weight on the host."""
    head = plain_head(model, _SAID, _INSTEAD)
    put_head(model, head, HostHead(head.weight, head.bias, Transfers(device)))
