"""What a few real steps take, in the components of the prediction.

The very tracker of foresight watches real storages, on a CPU as on CUDA, where torch's own
statistics tell the totals. `predict_cpu` runs the prediction with the CPU's choices, so that both
can be laid side by side on any machine. `ResidentMemory` is what the system counts for the whole
process: beside storages, what the C library keeps for itself and what is mapped from files.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from qlora_trainer.base.audit import audit_base
from qlora_trainer.base.layer_shards import ShardStore
from qlora_trainer.base.layer_stream import stream_of
from qlora_trainer.memory.foresight import simulate_run
from qlora_trainer.memory.loading import ROLE_COMPONENTS
from qlora_trainer.memory.log import PHASE, RESET_PEAK
from qlora_trainer.memory.program import RunShape
from qlora_trainer.memory.simulate import Live, Trace
from qlora_trainer.memory.tracker import AllocationTracker
from qlora_trainer.memory.watched_step import tag_gradients, watch_step
from qlora_trainer.tasks.task import Batch, Task
from qlora_trainer.training.optimizer import AdapterAdamW


@dataclass(frozen=True)
class Measured:
    """Peaks of real steps.

    Attributes:
        allocated_bytes: Live storages on a CPU, `max_memory_allocated` on CUDA.
        reserved_bytes: `max_memory_reserved`; None on a CPU.
        resident_bytes: The process' resident memory afterwards.
        by_component: Live storages at their peak.
        by_phase: Peak of live storages in each phase.
    """

    allocated_bytes: int
    reserved_bytes: int | None
    resident_bytes: int
    by_component: dict[str, int] = field(default_factory=dict)
    by_phase: dict[str, int] = field(default_factory=dict)


def measure_steps(
    model: Any,
    micro_batches: Sequence[Batch],
    *,
    task: Task,
    optimizer: AdapterAdamW,
    device: torch.device,
    steps: int = 2,
) -> Measured:
    """Run real steps and say what they took.

    Args:
        model: Base and adapters, on `device`.
        micro_batches: One window, prepared by the task.
        task: The loss.
        optimizer: Holds the trained parameters; they move.
        device: Where the model is.
        steps: How many; the second has the optimizer's states.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    live = track_steps(
        model, micro_batches, task=task, optimizer=optimizer, device=device, steps=steps
    ).live()
    allocated, reserved = live.peak_bytes, None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        allocated = torch.cuda.max_memory_allocated(device)
        reserved = torch.cuda.max_memory_reserved(device)
    resident = psutil.Process().memory_info().rss
    return Measured(allocated, reserved, resident, live.by_component, live.by_phase)


def track_steps(
    model: Any,
    micro_batches: Sequence[Batch],
    *,
    task: Task,
    optimizer: AdapterAdamW,
    device: torch.device,
    steps: int = 2,
) -> Trace:
    """Run real steps under the tracker and keep the log."""
    tracker = _started(model, optimizer, device)
    for batch in micro_batches:
        for tensor in batch.values():
            tracker.adopt(tensor, "load", "batch")
    tag_gradients(tracker, optimizer.parameters.values())
    tracker.mark(RESET_PEAK)
    model.train()
    with tracker, _uncompiled():
        for step in range(steps):
            watch_step(
                tracker,
                model,
                micro_batches,
                task=task,
                optimizer=optimizer,
                device=device,
                step=step,
            )
    tracker.close()
    return Trace(tracker.log)


def _started(model: Any, optimizer: AdapterAdamW, device: torch.device) -> AllocationTracker:
    """A tracker that knows what stands before a step, by component."""
    tracker = AllocationTracker(device.type)
    tracker.set_phase("load")
    trained = {id(p) for p in optimizer.parameters.values()}
    roles = {item.name: item.role for item in audit_base(model).tensors}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        role = ROLE_COMPONENTS.get(roles.get(name, "other"), "norms and other")
        tracker.adopt(tensor, "load", "adapters" if id(tensor) in trained else role)
    for _name, tensor, _pageable in optimizer.state_tensors():
        tracker.adopt(tensor, "load", "optimizer states")
    stream = stream_of(model)
    if stream is not None and isinstance(stream.store, ShardStore):
        _follow_gathering(tracker, stream.store)
    return tracker


def _follow_gathering(tracker: AllocationTracker, store: ShardStore) -> None:
    """Count parts, and whole layers, whose storages torch fills and empties in their places."""
    alive: dict[int, int] = {}

    def changed(layer: int, size_bytes: int) -> None:
        if size_bytes:
            alive[layer] = tracker.allocate(size_bytes, "unshard", "gathered layers")
        else:
            tracker.free(alive.pop(layer))

    for part in store.parts():
        tracker.adopt(part, "load", "layer parts")
    store.gather_each()  # now, as storages are new the first time, which the tracker would see
    store.watch = changed
    for layer, size_bytes in store.whole().items():
        changed(layer, size_bytes)


@contextmanager
def watched_step(
    model: Any, optimizer: AdapterAdamW, device: torch.device, found: list[Live]
) -> Iterator[None]:
    """Track what a training step does inside, whoever runs it; its peaks are added to `found`."""
    tracker = _started(model, optimizer, device)
    tracker.mark(RESET_PEAK)
    tracker.follow_engine(("forward", "backward"))
    try:
        with tracker, _uncompiled():
            yield
    finally:
        tracker.close()
    found.append(Trace(tracker.log).live())


def _uncompiled() -> AbstractContextManager[None]:
    """Let compiled modules run operator by operator: a kernel shows the tracker none of its own."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def without_evaluation(trace: Trace) -> Trace:
    """The trace up to where evaluation begins: what real steps alone can be compared with."""
    events = trace.log.events
    ends = [i for i, event in enumerate(events) if event == (PHASE, "evaluation")]
    return Trace(replace(trace.log, events=events[: ends[0]])) if ends else trace


def predict_cpu(config: Any, shape: RunShape) -> Live:
    """The prediction with the CPU's own kernels and no caching allocator."""
    return simulate_run(config, shape, None).trace.live()


class ResidentMemory:
    """What the system counts for this process, over what it held when this was made."""

    def __init__(self) -> None:
        self._before = psutil.Process().memory_info().rss
        self._highest_before = _highest_resident_bytes()

    def highest_bytes(self) -> int | None:
        """The most since, over the beginning; None where it was higher before, which hides it."""
        highest = _highest_resident_bytes()
        if highest <= self._highest_before and self._highest_before > 1.02 * self._before:
            return None
        return highest - self._before


def _highest_resident_bytes() -> int:
    """The high-water mark of this process' resident memory."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))
