"""AdamW for adapters: bitsandbytes' kernels, fp32 values behind bf16 adapters, honest bytes.

A bf16 value has 8 bits of mantissa; an update of 1e-4 of its size is lost in it. The optimizer
therefore keeps for every bf16 parameter the 16 bits that bf16 leaves out, as an integer: parameter
and remainder together *are* the fp32 value, bit for bit, for 2 bytes instead of the 4 of a separate
fp32 copy. The fp32 value exists for one tensor at a time, while bitsandbytes' kernel updates it.

We hold the states ourselves rather than through bitsandbytes' optimizer classes: they page only
state tensors of at least 100,000 elements (bitsandbytes `Optimizer8bit.get_state_buffer`), which
most adapters' tensors are not, and the bytes really pageable are to be said; their states are saved
here without pickle.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

from qlora_trainer.errors import UserError

OptimizerKind = Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "adamw"]
PAGED_MIN_ELEMENTS = 100_000  # bitsandbytes 0.50: `p.numel() < 1e5` stays on the card
EIGHT_BIT_MIN_ELEMENTS = 4096  # bitsandbytes' min_8bit_size
_BLOCK = 256  # elements per absmax of 8-bit states


@dataclass(frozen=True)
class OptimizerBytes:
    """Bytes the optimizer holds for its whole life.

    Attributes:
        total_bytes: Everything below together.
        pageable_bytes: States that bitsandbytes pages to host memory on CUDA.
        on_card_bytes: What stays on the card in any case.
        remainder_bytes: Of `on_card_bytes`, the low halves of bf16 parameters.
    """

    total_bytes: int
    pageable_bytes: int
    on_card_bytes: int
    remainder_bytes: int


class AdapterAdamW:
    """AdamW (Loshchilov and Hutter, 2019) over named parameters in bf16 or fp32.

    Attributes:
        parameters: What is trained, by name.
        kind: Which states and kernels.
        steps: Updates each parameter has had (a mixture's expert may have had fewer).
        notes: What the user is to be told once.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        kind: OptimizerKind = "paged_adamw_32bit",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        wrong = [
            f"{name} is {p.dtype}"
            for name, p in parameters.items()
            if p.dtype not in (torch.bfloat16, torch.float32)
        ]
        if wrong:
            raise UserError.from_faults("trained tensors must be bf16 or fp32", wrong)
        self.parameters = dict(parameters)
        self.kind = kind
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.steps = dict.fromkeys(self.parameters, 0)
        self.half_applied = False  # an update was begun and did not end: the values are of no step
        self.notes: list[str] = []
        self._maps: dict[str, Tensor] = {}
        self._states = {name: self._new_state(p) for name, p in self.parameters.items()}
        if self.paged and any(p.device.type == "cpu" for p in self.parameters.values()):
            self.notes.append(
                f"train.optimizer = {kind}: a CPU has nothing to page; the same states are held "
                "in ordinary memory"
            )

    @property
    def paged(self) -> bool:
        """The kind asks for paged states."""
        return self.kind.startswith("paged_")

    def _eight_bit(self, p: Tensor) -> bool:
        return self.kind.endswith("_8bit") and p.numel() >= EIGHT_BIT_MIN_ELEMENTS

    def _pageable(self, p: Tensor) -> bool:
        return self.paged and p.numel() >= PAGED_MIN_ELEMENTS

    def _new_state(self, p: Tensor) -> dict[str, Tensor]:
        dtype = torch.uint8 if self._eight_bit(p) else torch.float32
        state = {"first": self._buffer(p, dtype), "second": self._buffer(p, dtype)}
        if dtype == torch.uint8:
            if not self._maps:
                self._maps = {
                    "first": bnb.create_dynamic_map(signed=True).to(p.device),
                    "second": bnb.create_dynamic_map(signed=False).to(p.device),
                }
            blocks = -(-p.numel() // _BLOCK)
            for name in ("absmax_first", "absmax_second"):
                state[name] = torch.zeros(blocks, dtype=torch.float32, device=p.device)
        if p.dtype == torch.bfloat16:
            state["remainder"] = torch.zeros_like(p, dtype=torch.int16, requires_grad=False)
        return state

    def _buffer(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        if self._pageable(p) and p.device.type == "cuda":
            buffer: Tensor = bnb.get_paged(*p.shape, dtype=dtype, device=p.device)
            bnb.fill(buffer, 0)
            return buffer
        return torch.zeros(p.shape, dtype=dtype, device=p.device)

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_factor: Tensor | None = None) -> None:
        """Update every parameter that has a gradient, and free each gradient as it goes.

        Args:
            learning_rate: Of this step.
            gradient_factor: Scalar the gradients are multiplied by, in fp32 (clipping, loss scale).
        """
        self.half_applied = True  # until all have moved
        paged_device: torch.device | None = None
        for name, p in self.parameters.items():
            if p.grad is None:
                continue
            gradient = p.grad.to(torch.float32, memory_format=torch.contiguous_format)
            p.grad = None
            if gradient_factor is not None:
                gradient.mul_(gradient_factor)
            state = self._states[name]
            self.steps[name] += 1
            for tensor in (state["first"], state["second"]):
                if getattr(tensor, "is_paged", False):
                    bnb.prefetch_tensor(tensor)
                    paged_device = p.device
            remainder = state.get("remainder")
            value = p.data if remainder is None else join_bf16(p.data, remainder)
            self._update(value, gradient, state, self.steps[name], learning_rate)
            if remainder is not None:
                split_bf16(value, p.data, remainder)
        if paged_device is not None:
            torch.cuda.synchronize(paged_device)  # paged memory is written asynchronously
        self.half_applied = False

    def _update(
        self, value: Tensor, gradient: Tensor, state: dict[str, Tensor], step: int, lr: float
    ) -> None:
        beta1, beta2 = self.betas
        decay = self.weight_decay if value.ndim > 1 else 0.0
        first, second = state["first"], state["second"]
        if first.dtype == torch.uint8:
            torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
                "adam", gradient, value, first, second, beta1, beta2, 0.0, 0.0, self.eps, step, lr,
                self._maps["first"], self._maps["second"],
                state["absmax_first"], state["absmax_second"], decay, 1.0, False,
            )  # fmt: skip
        elif self.kind == "adamw":
            plain_adamw(value, gradient, first, second, step, lr, self.betas, self.eps, decay)
        else:
            torch.ops.bitsandbytes.optimizer_update_32bit(
                "adam", gradient, value, first, second, None, 0.0, 0.0, beta1, beta2, 0.0, 0.0,
                self.eps, decay, step, lr, 1.0, False,
            )  # fmt: skip

    def drop_gradients(self) -> None:
        """Free all gradients without a step."""
        for p in self.parameters.values():
            p.grad = None

    def state_tensors(self) -> Iterator[tuple[str, Tensor, bool]]:
        """Every tensor held, as (name, tensor, lives in paged memory on CUDA)."""
        for name, state in self._states.items():
            pageable = self._pageable(self.parameters[name])
            for part, tensor in state.items():
                yield f"{name}|{part}", tensor, pageable and part in ("first", "second")
        for part, tensor in self._maps.items():
            yield f"|map_{part}", tensor, False

    def optimizer_bytes(self) -> OptimizerBytes:
        """Count what is held; pageable bytes as CUDA would page them, whatever the device."""
        total = pageable = remainder = 0
        for name, tensor, is_pageable in self.state_tensors():
            total += tensor.nbytes
            pageable += tensor.nbytes if is_pageable else 0
            remainder += tensor.nbytes if name.endswith("|remainder") else 0
        return OptimizerBytes(total, pageable, total - pageable, remainder)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors for safetensors and values for JSON; together the exact state."""
        return (
            {name: tensor for name, tensor, _ in self.state_tensors()},
            {"kind": self.kind, "steps": dict(self.steps)},
        )

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Copy a saved state (on the CPU) into the tensors already held; no second copy on a card.

        Raises:
            UserError: The state belongs to other parameters or another kind; lists every fault.
        """
        faults = []
        if values["kind"] != self.kind:
            faults.append(f"train.optimizer: saved with {values['kind']}, now {self.kind}")
        held = {name: tensor for name, tensor, _ in self.state_tensors()}
        faults += [f"{name}: missing from the saved state" for name in held.keys() - tensors.keys()]
        faults += [f"{name}: not known to this run" for name in tensors.keys() - held.keys()]
        for name in sorted(held.keys() & tensors.keys()):
            ours, saved = held[name], tensors[name]
            if (ours.shape, ours.dtype) != (saved.shape, saved.dtype):
                faults.append(
                    f"{name}: saved {tuple(saved.shape)} {saved.dtype}, "
                    f"here {tuple(ours.shape)} {ours.dtype}"
                )
        if faults:
            raise UserError.from_faults("the saved optimizer state does not fit this run", faults)
        for name, tensor in held.items():
            tensor.copy_(tensors[name])
        self.steps = {name: int(values["steps"][name]) for name in self.parameters}


def plain_adamw(
    value: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW update in plain PyTorch, in place; what every kernel is held against."""
    first.lerp_(gradient, 1.0 - betas[0])
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1.0 - betas[1])
    value.mul_(1.0 - lr * weight_decay)
    scale = (second / (1.0 - betas[1] ** step)).sqrt_().add_(eps)
    value.addcdiv_(first, scale, value=-lr / (1.0 - betas[0] ** step))


def join_bf16(high: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 value made of a bf16 value and the signed 16 bits below it."""
    bits = high.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return bits.add_(remainder).view(torch.float32)


def split_bf16(value: Tensor, high: Tensor, remainder: Tensor) -> None:
    """Write an fp32 value as its nearest bf16 and the signed remainder of bits; exact."""
    bits = value.view(torch.int32)
    top = bits.add(0x8000).bitwise_right_shift_(16)
    high.view(torch.int16).copy_(top)
    remainder.copy_(bits - top.bitwise_left_shift_(16))
