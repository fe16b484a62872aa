"""Running many rows through a model that is never whole in memory: layer by layer, row by row.

Every row has a thread that runs the model's own forward, whatever the architecture; where it is
about to enter a part with weights (a repeated layer, or any other module that owns some) it waits.
When all rows wait, the part is loaded, the rows pass it one after another, and it is let go. Only
one thread runs at any time, so each row is computed exactly as it would be alone with the whole
model in memory, and every part is read once for all rows.

Like `plain`, this file is handed as text to the fresh process and imports nothing of ours.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

Load = Callable[[str], None]


class _Abandoned(Exception):
    """Another row failed."""


class _Row(threading.Thread):
    """One row's forward, run in pieces."""

    def __init__(self, number: int, work: Callable[[int], Any], back: threading.Semaphore) -> None:
        super().__init__(daemon=True)
        self.number, self.work, self.back = number, work, back
        self.may_go = threading.Semaphore(0)
        self.waits_for: str | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.finished = self.abandoned = False

    def run(self) -> None:
        """Work from turn to turn, and keep what came out."""
        self.may_go.acquire()
        try:
            if not self.abandoned:
                self.result = self.work(self.number)
        except _Abandoned:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again where the turns are given
            self.error = error
        self.finished = True
        self.back.release()

    def wait_for(self, part: str) -> None:
        """Called in this thread: let the others run until the part is there."""
        self.waits_for = part
        self.back.release()
        self.may_go.acquire()
        if self.abandoned:
            raise _Abandoned

    def take_turn(self) -> None:
        """Called outside: run until the next part, or to the end."""
        self.waits_for = None
        self.may_go.release()
        self.back.acquire()
        if self.error is not None:
            raise self.error


def model_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are loaded one at a time: repeated layers, others with weights.

    A module that owns parameters beside children that do (a picture's position embeddings) is not
    among them, its children are: the few such parameters must be there throughout.
    """
    return dict(_parts(model, ""))


def _parts(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, GradientCheckpointingLayer):
        yield path, module
        return
    inner = [(n, c) for n, c in module.named_children() if any(True for _ in c.parameters())]
    if not inner and any(True for _ in module.parameters()):
        yield path, module
    for name, child in inner:
        yield from _parts(child, f"{path}.{name}" if path else name)


def run_in_turns(
    rows: int,
    work: Callable[[int], Any],
    parts: dict[str, nn.Module],
    *,
    load: Load,
    unload: Load,
) -> Iterator[Any]:
    """Do work for every row while one part of the model is in memory at a time.

    Args:
        rows: How many.
        work: Given a row's number, runs the model and returns a result.
        parts: Of the model, as `model_parts` gives them.
        load: Makes a part's weights be there.
        unload: Lets them go.

    Yields:
        The results in the order of the rows.
    """
    back = threading.Semaphore(0)
    waiting = [_Row(number, work, back) for number in range(rows)]

    def hook(part: str) -> Callable[..., None]:
        def before(_: nn.Module, __: Any) -> None:
            row = threading.current_thread()
            assert isinstance(row, _Row)
            row.wait_for(part)

        return before

    hooks = [module.register_forward_pre_hook(hook(path)) for path, module in parts.items()]
    next_row, done = 0, dict[int, Any]()
    try:
        for row in waiting:
            row.start()
            row.take_turn()
        while True:
            for row in [row for row in waiting if row.finished]:
                waiting.remove(row)
                done[row.number], row.result = row.result, None
            while next_row in done:
                yield done.pop(next_row)
                next_row += 1
            if not waiting:
                return
            part = str(waiting[0].waits_for)
            load(part)
            try:
                for row in [row for row in waiting if row.waits_for == part]:
                    while not row.finished and row.waits_for == part:  # some pass it twice
                        row.take_turn()
                    if row.number == next_row and row.finished:  # logits are large: hand them on
                        waiting.remove(row)
                        next_row += 1
                        result, row.result = row.result, None
                        yield result
            finally:
                unload(part)
    finally:
        for handle in hooks:
            handle.remove()
        for row in waiting:
            row.abandoned = True
            row.may_go.release()
        for row in waiting:
            row.join()


def empty_like(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """What stands in a parameter's place while its part is not loaded: shape and dtype only."""
    kept = dtype if tensor.is_floating_point() else tensor.dtype
    return nn.Parameter(torch.empty(tensor.shape, dtype=kept, device="meta"), requires_grad=False)


class MappedParts:
    """A model whose weights lie in mapped files, cast, moved and made part by part.

    Args:
        model: Its parameters in the files' dtype; those outside every part are settled for good.
        dtype_of: Given a floating parameter's name, the dtype it shall have; None leaves each its
            own.
        device: Where they shall be.
        swapped: `id` of a module inside a part -> makes the one that takes its place while loaded.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype_of: Callable[[str], torch.dtype] | None,
        device: torch.device,
        swapped: Mapping[int, Callable[[], nn.Module]] | None = None,
    ) -> None:
        self.parts = model_parts(model)
        self._device, self._dtype_of = device, dtype_of
        self._stored: dict[str, list[tuple[nn.Module, str, Tensor, torch.dtype]]] = {}
        self._swaps: dict[str, list[tuple[nn.Module, str, nn.Module, Any]]] = {}
        makers = dict(swapped or {})
        inside: set[int] = set()
        for path, part in self.parts.items():
            stored, swaps = self._stored.setdefault(path, []), self._swaps.setdefault(path, [])
            for inner, module in part.named_modules():
                inside.add(id(module))
                for name, child in module.named_children():
                    if id(child) in makers:
                        swaps.append((module, name, child, makers[id(child)]))
                for name, value in module.named_parameters(recurse=False):
                    dtype = self._wanted(value, f"{path}.{inner}.{name}")
                    stored.append((module, name, value.detach(), dtype))
        for entries in self._stored.values():
            for module, name, value, dtype in entries:
                module._parameters[name] = empty_like(value, dtype)
        for path, module in model.named_modules():
            if id(module) not in inside:
                for name, value in list(module.named_parameters(recurse=False)):
                    settled = value.detach().to(device, self._wanted(value, f"{path}.{name}"))
                    module._parameters[name] = nn.Parameter(settled, requires_grad=False)
            for name, buffer in list(module.named_buffers(recurse=False)):
                # Those of the file come in its dtype, others as their class computes them.
                stays = name in module._non_persistent_buffers_set
                dtype = buffer.dtype if stays else self._wanted(buffer, f"{path}.{name}")
                module._buffers[name] = buffer.to(device, dtype)
        for path, entries in self._stored.items():  # what is made anew is not loaded as well
            self._stored[path] = [entry for entry in entries if id(entry[0]) not in makers]

    def _wanted(self, value: Tensor, name: str) -> torch.dtype:
        if self._dtype_of is None or not value.is_floating_point():
            return value.dtype
        return self._dtype_of(name)

    def load(self, part: str) -> None:
        """Put a part's weights in their places."""
        for module, name, value, dtype in self._stored[part]:
            settled = value.to(self._device, dtype)
            module._parameters[name] = nn.Parameter(settled, requires_grad=False)
        for parent, name, _, make in self._swaps[part]:
            parent._modules[name] = make()

    def unload(self, part: str) -> None:
        """Take them out again."""
        for module, name, value, dtype in self._stored[part]:
            module._parameters[name] = empty_like(value, dtype)
        for parent, name, child, _ in self._swaps[part]:
            parent._modules[name] = child
