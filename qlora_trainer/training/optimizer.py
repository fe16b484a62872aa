"""AdamW for adapters: bitsandbytes' kernels, fp32 values behind bf16 adapters, honest bytes.

A bf16 value has 8 bits of mantissa; an update of 1e-4 of its size is lost in it. The optimizer
therefore keeps for every bf16 parameter the 16 bits that bf16 leaves out, as an integer: parameter
and remainder together *are* the fp32 value, bit for bit, for 2 bytes instead of the 4 of a separate
fp32 copy. The fp32 values exist for one group of parameters at a time, while the kernel updates it.

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
from qlora_trainer.training.adamw_math import join_bf16, plain_adamw, split_bf16
from qlora_trainer.training.parameter_groups import (
    GROUP_BYTES,
    Group,
    StateKind,
    in_fp32,
    make_groups,
)

OptimizerKind = Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "adamw"]


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
        group_bytes: int = GROUP_BYTES,
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
        self.betas, self.eps = betas, eps
        self.steps = dict.fromkeys(self.parameters, 0)
        self.half_applied = False  # an update was begun and did not end: the values are of no step
        self.notes: list[str] = []
        self._state_kind = StateKind(self.paged, kind.endswith("_8bit"))
        self._groups = make_groups(
            self.parameters, self._state_kind, weight_decay=weight_decay, group_bytes=group_bytes
        )
        self._alone = {
            name: one for group in self._groups for one in group.apart() for name in one.parameters
        }
        self._maps: dict[str, Tensor] = {}
        quantized = [p for p in self.parameters.values() if self._state_kind.quantizes(p)]
        if quantized:
            self._maps = {
                "first": bnb.create_dynamic_map(signed=True).to(quantized[0].device),
                "second": bnb.create_dynamic_map(signed=False).to(quantized[0].device),
            }
        if self.paged and any(p.device.type == "cpu" for p in self.parameters.values()):
            self.notes.append(
                f"train.optimizer = {kind}: a CPU has nothing to page; the same states are held "
                "in ordinary memory"
            )

    @property
    def paged(self) -> bool:
        """The kind asks for paged states."""
        return self.kind.startswith("paged_")

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_factor: Tensor | None = None) -> None:
        """Update every parameter that has a gradient, and free each gradient as it goes.

        Args:
            learning_rate: Of this step.
            gradient_factor: Scalar the gradients are multiplied by, in fp32 (clipping, loss scale).
        """
        self.half_applied = True  # until all have moved
        paged_device: torch.device | None = None
        for group in self._groups:
            for moving in self._moving(group):
                for tensor in (moving.state["first"], moving.state["second"]):
                    if getattr(tensor, "is_paged", False):
                        bnb.prefetch_tensor(tensor)
                        paged_device = next(iter(moving.parameters.values())).device
                self._move(moving, learning_rate, gradient_factor)
        if paged_device is not None:
            torch.cuda.synchronize(paged_device)  # paged memory is written asynchronously
        self.half_applied = False

    def _moving(self, group: Group) -> Iterator[Group]:
        """The group; each for itself where some have no gradient, now or in steps before."""
        reached = [name for name, p in group.parameters.items() if p.grad is not None]
        if len(reached) == len(group.parameters) and len({self.steps[n] for n in reached}) == 1:
            yield group
        else:
            yield from (self._alone[name] for name in reached)

    def _move(self, group: Group, lr: float, gradient_factor: Tensor | None) -> None:
        gradient, _ = in_fp32([p.grad for p in group.parameters.values() if p.grad is not None])
        step = 1 + self.steps[next(iter(group.parameters))]  # the same of all
        for name, p in group.parameters.items():
            p.grad = None
            self.steps[name] = step
        if gradient_factor is not None:
            gradient.mul_(gradient_factor)
        held = [p.data for p in group.parameters.values()]
        value, pieces = in_fp32(held)
        remainder = group.state.get("remainder")
        if remainder is not None:
            join_bf16(value, remainder)
        self._update(value, gradient, group, step, lr)
        if remainder is not None:
            split_bf16(value, remainder)
        if value is not held[0]:
            torch._foreach_copy_(held, pieces)

    def _update(self, value: Tensor, gradient: Tensor, group: Group, step: int, lr: float) -> None:
        beta1, beta2 = self.betas
        state, decay = group.state, group.decay
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
        for name, p in self.parameters.items():
            pageable = self._state_kind.pages(p)
            for part, tensor in self._alone[name].state.items():
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
