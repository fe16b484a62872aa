"""Other people's library code, turned into what it is on the card; for a process of its own.

- `Params4bit.to`: quantizes when it reaches the card; `meta` stands for the card here;
- `torch.nn.functional.softmax` from half precision to fp32: on CUDA one kernel without a copy of
  the input (aten/src/ATen/native/SoftMax.cpp), elsewhere cast first;
- loading: transformers' own loop, its loader threads reading weights ahead (`_ReadAhead`);
- `scaled_dot_product_attention`: the memory-efficient kernel the measurements pinned, with keys and
  values expanded to all heads first;
- `torch.cuda.empty_cache` inside `prepare_model_for_kbit_training` stays unheard (see `t4.py`).
"""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import core_model_loading as loading

from peft_recipes.loading import Slice


def _steer_quantization() -> None:
    from bitsandbytes.nn import Params4bit

    plain_to = Params4bit.to

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None and device.type == "meta" and not self.bnb_quantized:
            return self._quantize(device)
        return plain_to(self, *args, **kwargs)

    Params4bit.to = to


class _ReadAhead:
    """The loader's threads: while a weight is quantized, the next ones arrive.

    Inferred from the rows, not documented. Identical settings were measured with after-load sizes
    that differ (six TinyLlama rows: 1070.05 to 1077.55 MiB; two of SmolLM2-360M: 381.6 and 388.2),
    which weights loaded one by one cannot do, although transformers 5.17 says it loads them so when
    it quantizes. Several 16-bit weights were on the card at once, in an order that is chance. Here
    it is that of `workers` threads which each need time in proportion to a weight's bytes, and a
    tenth of that to quantize it: one order of the many that happen. No byte is fitted.
    """

    workers = 4  # core_model_loading.GLOBAL_WORKERS on a machine with at least four cores
    call_cost = 0.2  # of a read, in the time 1 MiB takes
    quantizing_cost = 0.1

    def __init__(self) -> None:
        self.waiting: list[tuple[Slice, Any, Any]] = []
        self.arrived: dict[int, torch.Tensor] = {}
        self.ready: list[tuple[float, int]] = []  # (when, number), in order of time
        self.next, self.now = 0, 0.0

    def submit(self, tensor: Slice, device: Any, dtype: Any) -> Callable[[], torch.Tensor]:
        number = len(self.waiting)
        self.waiting.append((tensor, device, dtype))
        return lambda: self.take(number)

    def take(self, number: int) -> torch.Tensor:
        if not self.ready:
            self.ready = self._schedule()
        self.now = max(self.now, next(when for when, each in self.ready if each == number))
        while self.next < len(self.ready) and self.ready[self.next][0] <= self.now:
            each = self.ready[self.next][1]
            self.arrived[each] = loading._materialize_copy(*self.waiting[each])
            self.next += 1
        tensor = self.waiting[number][0]
        if len(tensor.shape) == 2:
            self.now += self.quantizing_cost * tensor.mebibytes
        return self.arrived.pop(number)

    def _schedule(self) -> list[tuple[float, int]]:
        free = [0.0] * self.workers
        ready = []
        for number, (tensor, _device, _dtype) in enumerate(self.waiting):
            when = heapq.heappop(free) + self.call_cost + tensor.mebibytes
            ready.append((when, number))
            heapq.heappush(free, when)
        return sorted(ready)


def _steer_loading() -> None:
    ahead: list[_ReadAhead] = []
    plain = loading.convert_and_load_state_dict_in_model

    def convert(*args: Any, **kwargs: Any) -> Any:
        ahead.append(_ReadAhead())
        try:
            return plain(*args, **kwargs)
        finally:
            ahead.pop()

    def spawn(
        _pool: Any, tensor: Slice, device: Any = None, dtype: Any = None, **_kwargs: Any
    ) -> Any:
        return ahead[-1].submit(tensor, device, dtype)

    loading.convert_and_load_state_dict_in_model = convert
    loading.spawn_materialize = spawn


def _steer_attention() -> None:
    plain_softmax = F.softmax

    def softmax(
        input: torch.Tensor,
        dim: int | None = None,
        _stacklevel: int = 3,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        if input.is_meta and input.dtype == torch.float16 and dtype == torch.float32:
            return torch.ops.aten._softmax(input, dim, True)
        return plain_softmax(input, dim, _stacklevel, dtype)

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if key.size(-3) != query.size(-3):
            groups = query.size(-3) // key.size(-3)
            key = key.repeat_interleave(groups, dim=-3)
            value = value.repeat_interleave(groups, dim=-3)
        needs_grad = query.requires_grad or key.requires_grad or value.requires_grad
        if attn_mask is not None:
            attn_mask = _bias_of(attn_mask, query)
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query,
            key,
            value,
            attn_mask,
            torch.is_grad_enabled() and needs_grad,
            dropout_p,
            is_causal,
            scale=scale,
        )[0]

    F.softmax = softmax
    F.scaled_dot_product_attention = attention


def _bias_of(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A boolean mask becomes a padded additive one (convert_boolean_attn_mask, pad_bias)."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -1e9)
    size = mask.shape[-1]
    if size % 16:
        mask = F.pad(mask, (0, 16 - size % 16))[..., :size]
    return mask.expand(query.shape[0], query.shape[1], -1, -1)


def steer() -> None:
    """Turn the libraries of this process into what they are on the card; once, for its lifetime."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    _steer_quantization()
    _steer_loading()
    _steer_attention()
