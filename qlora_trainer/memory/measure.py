"""What a few real steps take, in the components of the prediction.

On a CPU the very tracker of foresight watches real storages; on CUDA torch's own statistics are the
truth. `predict_cpu` runs the prediction with the CPU's choices, so that both can be laid side by
side on any machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from qlora_trainer.memory.foresight import simulate_run
from qlora_trainer.memory.log import RESET_PEAK
from qlora_trainer.memory.program import RunShape, tag_gradients, watch_step
from qlora_trainer.memory.simulate import Live, Trace
from qlora_trainer.memory.tracker import AllocationTracker
from qlora_trainer.tasks.task import Batch, Task
from qlora_trainer.training.optimizer import AdapterAdamW


@dataclass(frozen=True)
class Measured:
    """Peaks of real steps.

    Attributes:
        allocated_bytes: Live storages on a CPU, `max_memory_allocated` on CUDA.
        reserved_bytes: `max_memory_reserved`; None on a CPU.
        resident_bytes: The process' resident memory afterwards.
        by_component: At the peak; empty on CUDA.
        by_phase: Peak of each phase; empty on CUDA.
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
        return _measure_cuda(model, micro_batches, task, optimizer, device, steps)
    live = track_steps(
        model, micro_batches, task=task, optimizer=optimizer, device=device, steps=steps
    ).live()
    return Measured(
        live.peak_bytes, None, psutil.Process().memory_info().rss, live.by_component, live.by_phase
    )


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
    tracker = AllocationTracker(device.type)
    tracker.set_phase("load")
    trained = {id(p) for p in optimizer.parameters.values()}
    for tensor in (*model.parameters(), *model.buffers()):
        tracker.adopt(tensor, "load", "adapters" if id(tensor) in trained else "base")
    for _name, tensor, _pageable in optimizer.state_tensors():
        tracker.adopt(tensor, "load", "optimizer states")
    for batch in micro_batches:
        for tensor in batch.values():
            tracker.adopt(tensor, "load", "batch")
    tag_gradients(tracker, optimizer.parameters.values())
    tracker.mark(RESET_PEAK)
    model.train()
    with tracker:
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


def _measure_cuda(
    model: Any,
    micro_batches: Sequence[Batch],
    task: Task,
    optimizer: AdapterAdamW,
    device: torch.device,
    steps: int,
) -> Measured:
    model.train()
    torch.cuda.reset_peak_memory_stats(device)
    silent = AllocationTracker("none")  # phases only; CUDA counts for itself
    for step in range(steps):
        watch_step(
            silent, model, micro_batches, task=task, optimizer=optimizer, device=device, step=step
        )
    torch.cuda.synchronize(device)
    return Measured(
        torch.cuda.max_memory_allocated(device),
        torch.cuda.max_memory_reserved(device),
        psutil.Process().memory_info().rss,
    )


def predict_cpu(config: Any, shape: RunShape) -> Live:
    """The prediction with the CPU's own kernels and no caching allocator."""
    return simulate_run(config, shape, None).trace.live()
