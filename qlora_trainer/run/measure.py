"""A few real steps on the device here, laid beside what was foreseen for them.

Both see the same batch: full length, every token trained. On a CPU both numbers are live storages,
ours tracked as the prediction tracks weightless ones; on CUDA the totals are `torch.cuda`'s own.
What the system counts for the process is told apart: it holds the C library's free lists too.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.base.machine import windows_driver
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError
from qlora_trainer.memory.allocator_settings import allocator_settings
from qlora_trainer.memory.foresight import Foresight, simulate_run
from qlora_trainer.memory.full_batch import full_batch
from qlora_trainer.memory.gpus import gpu_of_this_machine
from qlora_trainer.memory.measure import (
    Measured,
    ResidentMemory,
    measure_steps,
    without_evaluation,
)
from qlora_trainer.memory.simulate import Live
from qlora_trainer.run.foresee import run_shape, task_config
from qlora_trainer.run.report import Reporter, tensors_loaded
from qlora_trainer.training import setup


@dataclass(frozen=True)
class Comparison:
    """Predicted beside measured, in bytes.

    Attributes:
        device: Where it was measured.
        what: What the allocated bytes are on this device.
        predicted: `allocated` and, on CUDA, `reserved`.
        measured: The same.
        predicted_by_component: Live bytes at the peak.
        measured_by_component: The same.
        predicted_by_phase: Peak of each phase.
        measured_by_phase: The same.
        resident_bytes: What the process' resident memory grew by; None where that was hidden.
        foresight: The whole prediction, on CUDA.
    """

    device: str
    what: str
    predicted: dict[str, int]
    measured: dict[str, int]
    predicted_by_component: dict[str, int]
    measured_by_component: dict[str, int]
    predicted_by_phase: dict[str, int]
    measured_by_phase: dict[str, int]
    resident_bytes: int | None
    foresight: Foresight | None

    @property
    def errors(self) -> dict[str, float]:
        """Of each predicted number, as a fraction of the measured one."""
        return {
            name: predicted / self.measured[name] - 1 for name, predicted in self.predicted.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        content = asdict(self)
        content.pop("foresight")
        return content | {"errors": self.errors}


def measure_run(run: RunConfig, *, reporter: Reporter | None = None) -> Comparison:
    """Load the model, run two real steps, and compare.

    Args:
        run: The settings; its data is not read.
        reporter: Told what happens.

    Raises:
        UserError: There are no weights, or the model cannot have these settings.
    """
    if Path(run.model.source).expanduser().is_file():
        raise UserError(
            f"--measure: {run.model.source} is a configuration without weights; name the model's "
            "folder"
        )
    told = reporter or Reporter()
    source = setup.open_model(run)
    setup.check_length(run, source.config)
    gpu = gpu_of_this_machine(source.device)
    shape = run_shape(run, source.config, gpu[0] if gpu else None)
    config = task_config(run, source.config)
    told.say("foreseeing these steps, then running them")
    auto_class = source.kind.auto_class
    simulated = simulate_run(config, shape, gpu[0] if gpu else None, model_class=auto_class)
    simulated.trace = without_evaluation(simulated.trace)
    predicted: Foresight | Live = simulated.trace.live()
    if gpu is not None:
        allocator = allocator_settings()
        predicted = simulated.on(
            gpu[0], budget_bytes=gpu[1], expandable_segments=allocator.expandable_segments,
            paged_on_card=windows_driver(),
        )  # fmt: skip
        if allocator.note is not None:
            told.say(allocator.note)
    resident = ResidentMemory()
    model = setup.load_model(run, source, tensors_loaded(told))
    setup.add_adapter(run, model, source.base_spec.compute_dtype, source.kind)
    for line in setup.set_activations(run, model, shape.activations):
        told.say(line)
    task = setup.make_task(run, model, source, None)
    batch = task.prepare(full_batch(shape, config, model.config._attn_implementation))
    measured = measure_steps(
        model,
        [batch] * min(shape.accumulation, 2),
        task=task,
        optimizer=setup.make_optimizer(run, model),
        device=source.device,
    )
    return _compare(source.device, measured, predicted, resident.highest_bytes())


def _compare(
    device: torch.device, measured: Measured, predicted: Foresight | Live, resident: int | None
) -> Comparison:
    real = {"allocated": measured.allocated_bytes}
    if isinstance(predicted, Live):
        what, said = "live storages", {"allocated": predicted.peak_bytes}
        by_phase = predicted.by_phase
    else:
        what, said = "torch.cuda.max_memory_allocated", {"allocated": predicted.allocated_bytes}
        by_phase = predicted.allocated_by_phase
    if measured.reserved_bytes is not None and isinstance(predicted, Foresight):
        real["reserved"], said["reserved"] = measured.reserved_bytes, predicted.reserved_bytes
    return Comparison(
        device=str(device),
        what=what,
        predicted=said,
        measured=real,
        predicted_by_component=dict(predicted.by_component),
        measured_by_component=dict(measured.by_component),
        predicted_by_phase=dict(by_phase),
        measured_by_phase=dict(measured.by_phase),
        resident_bytes=resident,
        foresight=predicted if isinstance(predicted, Foresight) else None,
    )
