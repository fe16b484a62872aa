"""What memory a training run is foreseen to take before step 1, and what it took.

Foresees the run on the device at hand, with the longest row of its data in place of
`data.max_seq_len`; refuses what has no room there (`room`). After the run it lays what was measured
beside what was foreseen: `memory.json`.

Like is compared with like. On CUDA `torch.cuda`'s peaks of the whole run stand beside the largest
batch foreseen. On a CPU nobody counts storages while a run trains, and resident memory also holds
imports, mapped files and what the C library keeps; so the first step is tracked, storage by
storage, and that very step is foreseen once more, with its own batch.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qlora_trainer.base.machine import host_memory_bytes, windows_driver
from qlora_trainer.base.variable_length import FIRST_CAPABILITY
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.data.packing import pack
from qlora_trainer.errors import UserError
from qlora_trainer.memory.allocator_settings import AllocatorSettings, allocator_settings
from qlora_trainer.memory.foresight import simulate_run
from qlora_trainer.memory.gpus import GpuProfile, gpu_of_this_machine
from qlora_trainer.memory.measure import watched_step
from qlora_trainer.memory.program import RunShape
from qlora_trainer.memory.simulate import Live
from qlora_trainer.memory.tracker import UnforeseeableOperator
from qlora_trainer.run.foresee import run_shape, simulate_solved, task_config
from qlora_trainer.run.report import Reporter
from qlora_trainer.run.room import disk_of_all, room_on_card, room_on_cpu, room_on_disk
from qlora_trainer.tasks.task import Batch
from qlora_trainer.training import setup
from qlora_trainer.training.activations import Activation
from qlora_trainer.training.optimizer import AdapterAdamW
from qlora_trainer.training.processes import ALONE, Processes
from qlora_trainer.units import format_bytes

_STEP_PHASES = ("forward", "backward", "optimizer step")


@dataclass
class Forecast:
    """What was foreseen for a run, and what is needed to compare it.

    Attributes:
        device: The card's name, or `cpu`.
        torch_device: Where the run is.
        predicted: The largest batch, for `memory.json`; None where the model cannot be foreseen.
        foresee_batch: Peak of live storages of a step of so many batches like the one at hand.
        first_window: Micro-batches of the first step, once it has been watched.
        first_step: What it took, likewise.
        activations: What was foreseen for the layers; `auto` is solved.
        loss_chunk_tokens: Of the run file, or what the card leaves room for; None: the least.
        processes: Those of the run; what is foreseen and measured is one's.
    """

    device: str
    torch_device: torch.device
    predicted: dict[str, Any] | None
    foresee_batch: Callable[[Batch, int], int]
    first_window: Sequence[Batch] = ()
    first_step: list[Live] = field(default_factory=list)
    activations: Activation | Sequence[Activation] = "recompute"
    loss_chunk_tokens: int | None = None
    processes: Processes = ALONE

    def watch(
        self, model: Any, optimizer: AdapterAdamW
    ) -> Callable[[Sequence[Batch]], AbstractContextManager[None]] | None:
        """What measures the first step on a CPU; CUDA counts for itself."""
        if self.predicted is None or self.torch_device.type != "cpu":
            return None

        def begin(window: Sequence[Batch]) -> AbstractContextManager[None]:
            self.first_window = [window[index] for index in self.processes.share(len(window))]
            return watched_step(model, optimizer, self.torch_device, self.first_step)

        return begin

    def compare(self, told: Reporter) -> dict[str, Any]:
        """The content of `memory.json` once the run has ended; says it in one line."""
        content: dict[str, Any] = {"device": self.device, "predicted": self.predicted}
        content["measured"] = content["compared"] = None
        if self.torch_device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved(self.torch_device)
            allocated = torch.cuda.max_memory_allocated(self.torch_device)
            content["measured"] = {"allocated_bytes": allocated, "reserved_bytes": reserved}
            if self.predicted is not None:
                foreseen = self.predicted["reserved_bytes"]
                content["compared"] = _pair("reserved, whole run", foreseen, reserved)
        elif self.first_step:
            live = self.first_step[0].peak_bytes
            content["measured"] = {"first_step_live_bytes": live}
            content["compared"] = _pair("live storages, step 1", self._foresee_first(), live)
        pair = content["compared"]
        if pair is not None:
            told.say(
                f"memory: {format_bytes(pair['predicted_bytes'])} foreseen, "
                f"{format_bytes(pair['measured_bytes'])} measured ({pair['what']}; "
                f"{pair['error']:+.2%})"
            )
        return content

    def _foresee_first(self) -> int:
        """The first micro-batch has no gradients beside it; the largest of the others has."""

        def size(batch: Batch) -> int:
            return max(tensor.numel() for tensor in batch.values())

        first, *others = self.first_window
        found = self.foresee_batch(first, 1)
        return max(found, self.foresee_batch(max(others, key=size), 2)) if others else found


def _pair(what: str, predicted: int, measured: int) -> dict[str, Any]:
    error = predicted / measured - 1 if measured else 0.0
    return {
        "what": what, "predicted_bytes": predicted, "measured_bytes": measured, "error": error,
    }  # fmt: skip


def forecast_run(
    run: RunConfig,
    source: setup.ModelSource,
    data: setup.RunData,
    told: Reporter,
    processes: Processes = ALONE,
    *,
    choose_chunk: bool = True,
) -> Forecast:
    """Say what a run will need, before its base is loaded; of several processes each.

    Args:
        run: The settings.
        source: The model.
        data: Its rows.
        told: Told what is foreseen.
        processes: Those that make the run together.
        choose_chunk: Choose the loss's chunk on a card where `train.activations: auto` asks for
            what fits; a run that goes on keeps the one it began with.

    Raises:
        UserError: It cannot fit, and `memory.must_fit` is on; with every lack and the way out.
    """
    here = gpu_of_this_machine(source.device)
    gpu = here[0] if here else None
    name = gpu.name if gpu else "cpu"

    def foresee_batch(batch: Batch, count: int) -> int:
        exact = replace(shape, accumulation=count * processes.count)
        live = simulate_run(
            config, exact, gpu, model_class=source.kind.auto_class, batch=batch
        ).trace.live()
        return max(live.by_phase.get(phase, 0) for phase in _STEP_PHASES)

    config = task_config(run, source.config, setup.model_settings(data.encoder))
    shape = shape_of_data(run, run_shape(run, source.config, gpu, processes.count), data, gpu)
    sharing = processes.local_count
    allocator = allocator_settings() if here else AllocatorSettings()
    if allocator.note is not None:
        told.say(allocator.note)
    try:
        simulated = simulate_solved(
            run, config, shape, gpu,
            here[1] if here else int(0.9 * host_memory_bytes()[1]) // sharing,
            expandable_segments=allocator.expandable_segments, paged_on_card=windows_driver(),
            choose_chunk=choose_chunk,
        )  # fmt: skip
        shape = simulated.shape
        if run.train.activations == "auto":
            told.say(f"train.activations: auto came to {_counted(shape.activations)}")
    except (UnforeseeableOperator, RuntimeError) as error:
        told.say(f"memory: this model cannot be foreseen, so nothing is promised: {error}")
        return Forecast(
            name, source.device, None, foresee_batch, processes=processes,
            loss_chunk_tokens=processes.from_main(run.train.loss_chunk_tokens),
        )  # fmt: skip
    if here is None:
        predicted, faults = room_on_cpu(simulated, config, shape, told, sharing=sharing)
    else:
        rehearsed = run.memory.rehearse != "never"
        predicted, faults = room_on_card(
            simulated, config, shape, here, told, rehearsed=rehearsed, sharing=sharing,
            expandable_segments=allocator.expandable_segments,
        )  # fmt: skip
    predicted["disk_peak_bytes"] = disk_of_all(run, simulated, data)
    faults += room_on_disk(run, simulated, told)
    if faults and run.memory.must_fit:
        raise UserError.from_faults(
            "this run would not fit here; to try all the same: --set memory.must_fit=false", faults
        )
    for fault in faults:
        told.say(f"does not fit, and goes on as memory.must_fit is off: {fault}")
    if source.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(source.device)
    chunk = processes.from_main(shape.loss_chunk_tokens)
    if chunk != run.train.loss_chunk_tokens:
        told.say(f"train.loss_chunk_tokens: {chunk}, for which memory is left")
    return Forecast(
        name, source.device, predicted, foresee_batch, activations=shape.activations,
        loss_chunk_tokens=chunk, processes=processes,
    )  # fmt: skip


def _counted(plan: str | Sequence[str]) -> str:
    """A plan in words: `12 recompute, 4 keep`."""
    if isinstance(plan, str):
        return plan
    return ", ".join(f"{count} {choice}" for choice, count in Counter(plan).items())


def shape_of_data(
    run: RunConfig, shape: RunShape, data: setup.RunData, gpu: GpuProfile | None
) -> RunShape:
    """The shape with the largest batch that the rows at hand can make, on a card or (None) a CPU.

    How many examples share a row matters to the variable-length kernel alone; where they attend one
    by one they stay as they are in the shape, as every further one takes time to simulate.
    """
    rows = min(run.train.micro_batch_size, len(data.train))
    lengths = () if data.held_out is None else data.held_out.lengths
    held_out = int(max(lengths, default=0))
    asked = run.evaluation.micro_batch_size
    if held_out and (asked is not None or len(lengths) < rows):
        shape = replace(shape, held_out_rows=min(asked or rows, len(lengths)))
    if run.task == "seq2seq-lm":
        return replace(shape, micro_batch_size=rows)
    if run.data.packing:
        at_once = gpu is not None and gpu.compute_capability >= FIRST_CAPABILITY
        groups = pack(data.train.lengths, run.data.max_seq_len) if at_once else []
        examples = max(map(len, groups), default=shape.examples)
        return replace(shape, micro_batch_size=rows, examples=examples, longest_held_out=held_out)
    longest = max(int(data.train.lengths.max()), held_out)
    return replace(
        shape, micro_batch_size=rows, seq_len=min(shape.seq_len, longest), longest_held_out=held_out
    )
