"""Watch every storage of a program be born and die, without weights and without a GPU.

How: one `TorchDispatchMode` sees each operator's outputs. A storage not seen before is a birth; a
`weakref` on it tells its death at the very moment reference counting or the autograd engine drops
it. The result is a log, not a number: replayed through `memory/allocator.py` it gives the peaks of
any card. Works alike on `meta` tensors (foresight) and on real ones (`memory/measure.py`).

What an operator log does not show by itself (workspaces, temporaries inside a CUDA kernel's
wrapper) comes from a table of rules handed in; the CUDA one is `memory/cuda_rules.py`.

Given up: operators that allocate inside one fused call and are in no rule are under-counted.
"""

import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_trainer.errors import UserError
from qlora_trainer.memory.log import ALLOCATE, FREE, PHASE, WRAPPERS, Allocation, Log, maker_of
from qlora_trainer.memory.shapes import ShapeMemory
from qlora_trainer.memory.stand_in import stand_in

_LOSS_FILES = ("linear_cross_entropy.py", "base/head.py")
Rule: TypeAlias = Callable[["AllocationTracker", Any, tuple[Any, ...], dict[str, Any]], Any]


class UnforeseeableOperator(UserError):
    """An operator whose result depends on values, which weightless tensors do not have."""


@functools.cache
def _returns_alias(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    return schema is not None and all(
        # a write to storage not seen before is a birth: torch.tensor(...) shows no other
        r.alias_info is not None and not r.alias_info.is_write
        for r in schema.returns
    )


class AllocationTracker(TorchDispatchMode):
    """Log births and deaths of storages on one device type.

    Args:
        device_type: Storages of this device count as the card's memory (`meta` stands for CUDA).
        rules: What to do instead of, or around, an operator; by operator overload.
        answers: For Python branches on a tensor's value, which weightless tensors do not have:
            name of the asking function -> value. Anything else raises `UnforeseeableOperator`.
    """

    def __init__(
        self,
        device_type: str = "meta",
        rules: Mapping[Any, Rule] | None = None,
        answers: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.log = Log()
        self.device_type = device_type
        self.rules = dict(rules or {})
        self.answers = dict(answers or {})
        self.state: dict[str, Any] = {}  # for rules: workspaces already made, and the like
        self._phase = "start"
        self._component: str | None = None
        self._engine_phases: tuple[str, str] | None = None
        self._known: dict[int, int] = {}  # storage address -> allocation
        self._refs: dict[int, Any] = {}
        self._free_base: int | None = None
        self._shapes = ShapeMemory()

    # ---- phases and components -------------------------------------------------------------
    @property
    def current_phase(self) -> str:
        """Name of the phase that allocations are booked under."""
        return self._phase

    def set_phase(self, name: str) -> None:
        """Book what follows under `name`."""
        self._phase = name
        self.log.events.append((PHASE, name))

    @contextmanager
    def component(self, name: str) -> Iterator[None]:
        """Tag what is born inside as `name` (base weights, adapters, ...)."""
        before, self._component = self._component, name
        try:
            yield
        finally:
            self._component = before

    def tag(self, tensor: torch.Tensor, component: str) -> None:
        """Give an already recorded storage its component afterwards."""
        index = self._known.get(tensor.untyped_storage()._cdata)
        if index is not None and index >= 0:
            self.log.allocations[index].component = component

    def move_to_host(self, tensor: torch.Tensor) -> None:
        """On the real device this storage is managed or pinned memory, outside the allocator."""
        index = self._known.get(tensor.untyped_storage()._cdata)
        if index is not None and index >= 0:
            self.log.allocations[index].on_host = True

    def follow_engine(self, names: tuple[str, str] | None) -> None:
        """Name the phase by who is calling: (outside, inside) autograd's engine; None stops."""
        self._engine_phases = names
        if names is not None:
            self.set_phase(names[0])

    def mark(self, kind: int, about: int | str = 0) -> None:
        """Put a bare event (empty the cache, reset the peak, ...) into the log."""
        self.log.events.append((kind, about))

    # ---- births and deaths -----------------------------------------------------------------
    def allocate(
        self, size_bytes: int, operator: str, component: str = "workspaces", stream: int = 0
    ) -> int:
        """Log memory that no tensor shows; the caller frees it with `free`."""
        code, line = maker_of(sys._getframe(1))
        index = len(self.log.allocations)
        self.log.allocations.append(
            Allocation(int(size_bytes), self._phase, operator, code, line, component, stream)
        )
        self.log.events.append((ALLOCATE, index))
        return index

    def free(self, index: int) -> None:
        """Log the death of memory made by `allocate`."""
        self.log.events.append((FREE, index))

    @contextmanager
    def temporary(self, size_bytes: int, operator: str) -> Iterator[None]:
        """Memory that lives inside one operator."""
        index = self.allocate(size_bytes, operator)
        try:
            yield
        finally:
            self.free(index)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator from inside a rule; on weightless tensors its answer is remembered."""
        if self.device_type != "meta":
            return func(*args, **kwargs)
        try:
            return self._shapes.run(func, args, kwargs)
        except RuntimeError as error:  # torch has several words for such an operator
            return self._bounded(func, args, kwargs, error)

    def _bounded(self, func: Any, args: Any, kwargs: Any, error: RuntimeError) -> Any:
        """An operator without a weightless implementation, its inner memory at most as noted."""
        try:
            result, most_bytes = stand_in(func, args, kwargs)
        except ValueError:
            raise error from None
        name = str(func)
        self.log.bounded[name] = max(self.log.bounded.get(name, 0), most_bytes)
        with self.temporary(most_bytes, name):
            return result

    def count_kernel(self, name: str) -> None:
        """Remember that a kernel was chosen, to be printed with the prediction."""
        self.log.kernels[name] = self.log.kernels.get(name, 0) + 1

    def adopt(self, tensor: torch.Tensor, operator: str = "", component: str | None = None) -> None:
        """Record a tensor that was made outside the watch (a birth now)."""
        self._birth(tensor, operator or "adopted", sys._getframe(1), component)

    def ignore(self, tensor: torch.Tensor) -> None:
        """A tensor that on the real device would not be on the card."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        self._known[address] = -1
        self._refs[address] = weakref.ref(storage, functools.partial(self._forget, address))

    def _forget(self, address: int, _ref: Any) -> None:
        self._known.pop(address, None)
        self._refs.pop(address, None)

    def _birth(
        self, tensor: torch.Tensor, operator: str, frame: FrameType | None, component: str | None
    ) -> None:
        if tensor.device.type != self.device_type or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known:
            return
        size_bytes = storage.nbytes()
        if size_bytes == 0:
            return
        code, line = maker_of(frame)
        index = len(self.log.allocations)
        label = component or self._component or self._guess_component(operator, code)
        self.log.allocations.append(
            Allocation(size_bytes, self._phase, operator, code, line, label)
        )
        self.log.events.append((ALLOCATE, index))
        self._known[address] = index
        self._refs[address] = weakref.ref(storage, functools.partial(self._death, address, index))

    def _death(self, address: int, index: int, _ref: Any) -> None:
        self._known.pop(address, None)
        self._refs.pop(address, None)
        self.log.events.append((FREE, index))

    def _guess_component(self, operator: str, code: CodeType | None) -> str:
        file = "" if code is None else code.co_filename
        if operator.startswith("dequantize") or file.endswith("base/bitsandbytes_cpu.py"):
            return "dequantized weights"
        if file.endswith(_LOSS_FILES):
            return "logits and loss"
        if self._phase == "backward":
            return "recomputed layer" if torch.is_grad_enabled() else "backward temporaries"
        return "kept activations" if self._phase == "forward" else self._phase

    def close(self) -> None:
        """Stop listening to deaths (the log stays as it is)."""
        self._refs.clear()
        self._known.clear()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; torch's guard against it would wrap every single operator."""
        return False

    # ---- the mode itself -------------------------------------------------------------------
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator (or its rule) and record its new storages."""
        kwargs = kwargs or {}
        if self._engine_phases is not None:
            name = self._engine_phases[torch._C._current_graph_task_id() != -1]
            if name != self._phase:
                self.set_phase(name)
        rule = self.rules.get(func)
        if rule is not None:
            result = rule(self, func, args, kwargs)
        elif func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self._answer(sys._getframe(1))
        elif func is torch.ops.aten.add.Tensor and self._engine_adds(
            args, kwargs, sys._getframe(1)
        ):
            # InputBuffer::accumulate (torch/csrc/autograd/input_buffer.cpp) adds in place when it
            # holds the last reference, but never while a mode is active
            result = torch.ops.aten.add_.Tensor(*args)
        else:
            result = self.run(func, args, kwargs)
        if _returns_alias(func):
            return result  # a view, or the argument itself: its storage was born elsewhere
        if isinstance(result, torch.Tensor):
            self._birth(result, func.__name__, sys._getframe(1), None)
        elif isinstance(result, (tuple, list)):
            for part in result:
                if isinstance(part, torch.Tensor):
                    self._birth(part, func.__name__, sys._getframe(1), None)
        return result

    def _answer(self, frame: FrameType | None) -> Any:
        asked = frame
        while asked is not None:
            if asked.f_code.co_name in self.answers:
                return self.answers[asked.f_code.co_name]
            asked = asked.f_back
        code, line = maker_of(frame)
        where = f"{code.co_filename}:{line} in {code.co_name}" if code else "torch"
        raise UnforeseeableOperator(
            f"memory foresight: {where} branches on a tensor's value, which weightless tensors do "
            "not have; measure this model with `--measure` instead"
        )

    def _engine_adds(self, args: Any, kwargs: Any, frame: FrameType) -> bool:
        if kwargs or len(args) != 2 or torch.is_grad_enabled():
            return False
        while frame.f_code.co_filename.endswith(WRAPPERS) and frame.f_back is not None:
            frame = frame.f_back  # torch wraps every mode's dispatch
        if frame.f_code.co_name != "_engine_run_backward":
            return False
        old, new = args
        return (
            isinstance(new, torch.Tensor)
            and old.shape == new.shape
            and old.dtype == new.dtype
            and (old.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(old))
            and self._is_last_reference(old)
        )

    def _is_last_reference(self, tensor: torch.Tensor) -> bool:
        if self._free_base is None:
            with torch.utils._python_dispatch._disable_current_modes():
                fresh = torch.empty(4, device=tensor.device)
            self._free_base = torch._C._storage_Use_Count(fresh.untyped_storage()._cdata)
        uses: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
        return uses <= self._free_base
