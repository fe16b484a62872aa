"""Saving and resuming as foresight sees them: `training/state.py`'s own code, without values.

Whatever that code allocates on the card the tracker sees. What it holds on the host is counted
here, beside the log: copies of a card's tensors have no part in the card's memory.
"""

import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from qlora_trainer.memory.tracker import AllocationTracker
from qlora_trainer.training.optimizer import AdapterAdamW
from qlora_trainer.training.state import SavedState, held_tensors, on_host, restore


class _HostCopies:
    """Stands for `tensor.cpu()`, which weightless tensors cannot do; counts the copies alive."""

    def __init__(self) -> None:
        self._alive_bytes = self.most_bytes = 0

    def copy(
        self, tracker: AllocationTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The rule for `aten._to_copy`."""
        if torch.device(kwargs.get("device") or "meta").type != "cpu":
            return tracker.run(func, args, kwargs)
        with _disable_current_modes():
            copy = torch.empty_like(args[0])
        tracker.ignore(copy)
        self._alive_bytes += copy.nbytes
        self.most_bytes = max(self.most_bytes, self._alive_bytes)
        weakref.finalize(copy.untyped_storage(), self._gone, copy.nbytes)
        return copy

    def _gone(self, size_bytes: int) -> None:
        self._alive_bytes -= size_bytes


def watch_save(tracker: AllocationTracker, optimizer: AdapterAdamW) -> int:
    """Copy a state to the host as a save does; -> the most bytes of copies at one time."""
    copies, operator = _HostCopies(), torch.ops.aten._to_copy.default
    before = tracker.rules.get(operator)
    tracker.rules[operator] = copies.copy
    try:
        for tensors in held_tensors(optimizer).values():
            on_host(tensors)
    finally:
        del tracker.rules[operator]
        if before is not None:
            tracker.rules[operator] = before
    return copies.most_bytes


def watch_resume(tracker: AllocationTracker, optimizer: AdapterAdamW) -> int:
    """Copy a saved state into the tensors held; -> bytes of what was read back, all at once."""
    with _disable_current_modes():
        adapter, states = (
            {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
            for tensors in held_tensors(optimizer).values()
        )
    read = [*adapter.values(), *states.values()]
    for tensor in read:
        tracker.ignore(tensor)
    restore(SavedState(Path(), 0, adapter, states, {"optimizer": optimizer.state()[1]}), optimizer)
    return sum(tensor.nbytes for tensor in read)
