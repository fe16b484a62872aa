"""Parameters alike, gathered into groups that an optimizer updates in one go.

An adapter is hundreds of small tensors; updated one by one, calling the operators costs more than
their arithmetic. The states of a group lie end to end in flat tensors, of which each parameter's
own are views; gradients and values are joined for the update and the values copied back. AdamW is
elementwise, so all bits are those of tensors updated alone; where they would not be, because two
tensors would share a block of 8-bit states, a parameter stays alone, and so does a paged one.

Given up: memory for one group's joined gradients and values while it moves (`GROUP_BYTES` each).
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

PAGED_MIN_ELEMENTS = 100_000  # bitsandbytes 0.50: `p.numel() < 1e5` stays on the card
EIGHT_BIT_MIN_ELEMENTS = 4096  # bitsandbytes' min_8bit_size
# Of a group's values in fp32, or one larger tensor: what torch's CUDA allocator still counts as
# small, so that joining cuts nothing from the large segments (c10/cuda: kSmallSize).
GROUP_BYTES = 2**20
_BLOCK = 256  # elements per absmax of 8-bit states
_BY_BLOCK = ("absmax_first", "absmax_second")


@dataclass(frozen=True)
class StateKind:
    """Which states are wanted; small tensors have them in 32 bits and unpaged all the same.

    Attributes:
        paged: In managed memory on CUDA.
        eight_bit: Blockwise quantized.
    """

    paged: bool
    eight_bit: bool

    def pages(self, p: Tensor) -> bool:
        """CUDA would page this parameter's states."""
        return self.paged and p.numel() >= PAGED_MIN_ELEMENTS

    def quantizes(self, p: Tensor) -> bool:
        """This parameter's states have 8 bits."""
        return self.eight_bit and p.numel() >= EIGHT_BIT_MIN_ELEMENTS

    def joins(self, p: Tensor) -> bool:
        """This parameter may be updated with others, bit for bit as alone."""
        whole_blocks = not self.quantizes(p) or p.numel() % _BLOCK == 0
        return whole_blocks and not self.pages(p) and p.is_contiguous()


@dataclass(frozen=True)
class Group:
    """Parameters updated in one go.

    Attributes:
        parameters: By name, in the order in which they lie in the states.
        decay: Weight decay of all of them.
        state: `first`, `second`, with 8 bits `absmax_first` and `absmax_second`, for bf16
            `remainder`: flat (shaped for a parameter alone).
    """

    parameters: dict[str, nn.Parameter]
    decay: float
    state: dict[str, Tensor]

    def apart(self) -> Iterator["Group"]:
        """Each parameter as a group of its own, whose states are views of these."""
        if len(self.parameters) == 1:
            yield self
            return
        pieces = {
            part: tensor.split([_length(part, p) for p in self.parameters.values()])
            for part, tensor in self.state.items()
        }
        for index, (name, p) in enumerate(self.parameters.items()):
            views = {part: split[index] for part, split in pieces.items()}
            shaped = {
                part: view if part in _BY_BLOCK else view.view(p.shape)
                for part, view in views.items()
            }
            yield Group({name: p}, self.decay, shaped)


def make_groups(
    parameters: Mapping[str, nn.Parameter],
    kind: StateKind,
    *,
    weight_decay: float,
    group_bytes: int = GROUP_BYTES,
) -> list[Group]:
    """Gather parameters and make their states, all zero.

    Args:
        parameters: What is trained, by name.
        kind: Of the states.
        weight_decay: Of all but vectors.
        group_bytes: Of a group's values in fp32 at most, unless one tensor alone has more.
    """
    gathered: list[tuple[dict[str, nn.Parameter], float]] = []
    newest: dict[Hashable, dict[str, nn.Parameter]] = {}
    taken_bytes: dict[Hashable, int] = {}
    for name, p in parameters.items():
        decay = weight_decay if p.ndim > 1 else 0.0
        alike = (p.dtype, p.device, kind.quantizes(p), decay) if kind.joins(p) else name
        taken_bytes[alike] = taken_bytes.get(alike, 0) + 4 * p.numel()
        if alike not in newest or taken_bytes[alike] > group_bytes:
            newest[alike], taken_bytes[alike] = {}, 4 * p.numel()
            gathered.append((newest[alike], decay))
        newest[alike][name] = p
    return [Group(members, decay, _new_state(members, kind)) for members, decay in gathered]


def _new_state(members: Mapping[str, nn.Parameter], kind: StateKind) -> dict[str, Tensor]:
    p, *others = members.values()
    count = sum(each.numel() for each in (p, *others))
    shape = torch.Size([count]) if others else p.shape
    dtype = torch.uint8 if kind.quantizes(p) else torch.float32
    if kind.pages(p) and p.device.type == "cuda":
        state = {part: _paged(p, dtype) for part in ("first", "second")}
    else:
        state = {
            part: torch.zeros(shape, dtype=dtype, device=p.device) for part in ("first", "second")
        }
    if dtype == torch.uint8:
        blocks = sum(_length("absmax_first", each) for each in members.values())
        for part in _BY_BLOCK:
            state[part] = torch.zeros(blocks, dtype=torch.float32, device=p.device)
    if p.dtype == torch.bfloat16:
        state["remainder"] = torch.zeros(shape, dtype=torch.int16, device=p.device)
    return state


def _paged(p: Tensor, dtype: torch.dtype) -> Tensor:
    buffer: Tensor = bnb.get_paged(*p.shape, dtype=dtype, device=p.device)
    bnb.fill(buffer, 0)
    return buffer


def _length(part: str, p: Tensor) -> int:
    return -(-p.numel() // _BLOCK) if part in _BY_BLOCK else p.numel()


def in_fp32(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Several tensors end to end; one in its own shape, itself if it is in fp32 already.

    Returns:
        The values in one tensor, flat if of several, and each one's, views of it.
    """
    if len(tensors) == 1:
        alone = tensors[0].to(torch.float32, memory_format=torch.contiguous_format)
        return alone, [alone]
    lengths = [tensor.numel() for tensor in tensors]
    flat = torch.empty(sum(lengths), dtype=torch.float32, device=tensors[0].device)
    parts = zip(flat.split(lengths), tensors, strict=True)
    pieces = [part.view(tensor.shape) for part, tensor in parts]
    torch._foreach_copy_(pieces, list(tensors))
    return flat, pieces
