"""What a run will need, found by running its very step on weightless tensors.

`foresee` builds the base without weights, puts the adapter on it, makes the optimizer and calls
`training/step.py`'s `train_step` twice, the task's evaluation once, and resumes and saves with
`training/state.py`, all on `meta` tensors under the tracker; the log is then replayed as any card's
allocator. Nothing is written down as a formula, so nothing drifts from the code that trains.
Numbers are for the torch, transformers and bitsandbytes installed here.

Assumed, and said: every sequence has the full length; every token is trained (the loss then makes
the most logits chunks); of packed rows what `full_batch` says.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_trainer.base.audit import LARGE_BYTES
from qlora_trainer.memory.artefacts import (
    PROCESS_BYTES,
    disk_peak_bytes,
    host_bytes_by_phase,
    merged_bytes,
)
from qlora_trainer.memory.attention import ANSWERS
from qlora_trainer.memory.full_batch import full_batch, held_out_batch
from qlora_trainer.memory.gpus import SPARE_SHARE, GpuProfile
from qlora_trainer.memory.program import Accounts, Program, RunShape
from qlora_trainer.memory.simulate import LiveTensor, Peaks, Trace, simulate
from qlora_trainer.memory.weightless_model import notes_of, weightless_model
from qlora_trainer.tasks.task import Batch

__all__ = ["Foresight", "RunShape", "SimulatedRun", "foresee", "simulate_run"]

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
PCIE_BYTES_PER_SECOND = 12e9  # PCIe 3.0 x16, or 4.0 x8, as copies of pinned memory reach it


@dataclass(frozen=True)
class Foresight:
    """The prediction for one configuration on one card; sizes in bytes.

    Attributes:
        allocated_bytes: Peak of live blocks.
        reserved_bytes: Peak of what the allocator holds: what must fit, beside the context.
        context_bytes: CUDA context and kernels, outside the allocator (an assumption of the card).
        paged_bytes: Optimizer states in managed memory: host RAM, or on the card when touched.
        total_bytes: reserved + context, and what is paged where that counts on the card.
        by_component: Live bytes at the peak.
        allocated_by_phase: Peak of each phase.
        peak_phase: Where the peak is.
        alive: The largest tensors at the peak, with the line that made them.
        kernels: Chosen kernels and how often.
        fits_without_retry: False where the allocator must give cached memory back to get through.
        fits: The replay at the card's capacity got through.
        host_bytes: Host RAM of the load and, at once, of what the steps keep there.
        disk_bytes: Artefact -> bytes, one of each.
        trained_parameters: How many numbers are trained.
        large_unquantized: Path -> bytes of large weights outside NF4.
        notes: What the user should know of the model's attention.
        paged_on_card: What is paged counts on the card (it does on Windows and WSL).
        pinned_bytes: Pinned host memory of offloaded layer inputs, streamed layers and a head.
        moved_bytes: Over PCIe, both ways, in one optimizer step; see `Accounts` for what counts.
        part_bytes: Of sharded layers, what each process holds.
        gathered_bytes: Of sharded layers, received from the other processes in one optimizer step.
        host_bytes_by_phase: Host RAM of each phase; see `artefacts.host_bytes_by_phase`.
        disk_peak_bytes: Artefact -> most bytes at one time; see `artefacts.disk_peak_bytes`.
        processes: How many make the run together; all sizes but those of the disk are one's.
        bounded: Operator without a weightless implementation -> bytes the peak may be off by.
        loss_chunk_tokens: Whose logits exist at one time; None: about 64 MiB of them.
    """

    gpu: str
    capacity_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    context_bytes: int
    paged_bytes: int
    by_component: dict[str, int]
    allocated_by_phase: dict[str, int]
    reserved_by_phase: dict[str, int]
    peak_phase: str
    alive: tuple[LiveTensor, ...]
    kernels: dict[str, int]
    fits: bool
    fits_without_retry: bool
    host_bytes: int
    disk_bytes: dict[str, int]
    trained_parameters: int
    large_unquantized: dict[str, int]
    notes: tuple[str, ...] = ()
    paged_on_card: bool = False
    pinned_bytes: int = 0
    moved_bytes: int = 0
    part_bytes: int = 0
    gathered_bytes: int = 0
    host_bytes_by_phase: dict[str, int] = field(default_factory=dict)
    disk_peak_bytes: dict[str, int] = field(default_factory=dict)
    timeline: tuple[tuple[int, int, str], ...] = field(default=(), repr=False)
    processes: int = 1
    bounded: dict[str, int] = field(default_factory=dict)
    loss_chunk_tokens: int | None = None

    @property
    def total_bytes(self) -> int:
        """What the process takes of the card."""
        paged = self.paged_bytes if self.paged_on_card else 0
        return self.reserved_bytes + self.context_bytes + paged

    @property
    def large_by_path(self) -> dict[str, int]:
        """Large weights outside NF4, those alike in every layer once: `layers.*.gate (48)`."""
        groups: dict[str, list[int]] = {}
        for name, size in self.large_unquantized.items():
            if size >= LARGE_BYTES:
                groups.setdefault(_NUMBER.sub(".*", name), []).append(size)
        sums = {
            f"{name} ({len(found)})" if len(found) > 1 else name: sum(found)
            for name, found in groups.items()
        }
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    @property
    def host_peak_bytes(self) -> int:
        """Host RAM at its highest."""
        return max(self.host_bytes, *self.host_bytes_by_phase.values())

    @property
    def moving_seconds(self) -> float:
        """What the copies of a step take as pinned memory is copied, were nothing else done."""
        return self.moved_bytes / PCIE_BYTES_PER_SECOND

    @property
    def gathering_seconds(self) -> float:
        """What gathering the layers of a step takes over the same bus, likewise."""
        return self.gathered_bytes / PCIE_BYTES_PER_SECOND

    @property
    def verdict(self) -> str:
        """`fits`, `tight` (less than 5 % of the card left) or `does not fit`."""
        if not self.fits:
            return "does not fit"
        left = self.capacity_bytes - self.total_bytes
        return "tight" if left < SPARE_SHARE * self.capacity_bytes else "fits"


@dataclass
class SimulatedRun:
    """A simulated configuration: its trace, and what is known beside it. Replay it on any card."""

    trace: Trace
    shape: RunShape
    accounts: Accounts

    def on(
        self,
        gpu: GpuProfile,
        *,
        budget_bytes: int | None = None,
        expandable_segments: bool = False,
        paged_on_card: bool = False,
        with_timeline: bool = False,
    ) -> Foresight:
        """What it takes on a card of the same architecture.

        Args:
            gpu: The card.
            budget_bytes: What of it is free for this process; its usable memory unless given.
            expandable_segments: Of the allocator's configuration.
            paged_on_card: Managed memory counts on the card; see `windows_driver`.
            with_timeline: Keep allocated and reserved after every event.
        """
        capacity = gpu.usable_bytes if budget_bytes is None else budget_bytes
        paged = self.accounts.paged_bytes if paged_on_card else 0
        room = max(0, capacity - gpu.context_bytes - paged)
        free = self.trace.replay(
            expandable_segments=expandable_segments, with_timeline=with_timeline
        )
        limited = free
        if free.reserved_bytes > room:
            limited = self.trace.replay(room, expandable_segments=expandable_segments)
        return replace(self._foresight(gpu, capacity, free, limited), paged_on_card=paged_on_card)

    def _foresight(self, gpu: GpuProfile, capacity: int, free: Peaks, limited: Peaks) -> Foresight:
        shown = limited if limited.fits else free
        return Foresight(
            gpu=gpu.name,
            capacity_bytes=capacity,
            allocated_bytes=shown.allocated_bytes,
            reserved_bytes=shown.reserved_bytes,
            context_bytes=gpu.context_bytes,
            paged_bytes=self.accounts.paged_bytes,
            by_component=dict(sorted(shown.by_component.items(), key=lambda item: -item[1])),
            allocated_by_phase=_of_phases(shown.allocated_by_phase),
            reserved_by_phase=_of_phases(shown.reserved_by_phase),
            peak_phase=shown.peak_phase,
            alive=tuple(shown.alive[:50]),
            kernels=dict(self.trace.log.kernels),
            bounded=dict(self.trace.log.bounded),
            fits=limited.fits,
            fits_without_retry=limited.fits and limited.retries == 0,
            host_bytes=self._host_bytes(),
            disk_bytes=self._disk_bytes(),
            trained_parameters=self.accounts.trained_parameters,
            large_unquantized=self.accounts.large_unquantized,
            notes=self.accounts.notes,
            pinned_bytes=self.accounts.pinned_bytes + self.accounts.waiting_bytes,
            moved_bytes=self.accounts.moved_bytes * self.shape.own_accumulation,
            part_bytes=self.accounts.part_bytes,
            gathered_bytes=self.accounts.gathered_bytes * self.shape.own_accumulation,
            host_bytes_by_phase=host_bytes_by_phase(self.accounts),
            disk_peak_bytes=disk_peak_bytes(self.accounts, self.shape.keep_last),
            timeline=tuple(free.timeline),
            processes=self.shape.processes,
            loss_chunk_tokens=self.shape.loss_chunk_tokens,
        )

    def _host_bytes(self) -> int:
        # weights are memory-mapped; one tensor at a time is private, the page-outs come on top
        took = self.accounts
        stays = took.paged_bytes + took.pinned_bytes + took.host_table_bytes + took.waiting_bytes
        return PROCESS_BYTES + 2 * took.largest_tensor_bytes + stays

    def _disk_bytes(self) -> dict[str, int]:
        adapter = self.accounts.trained_bytes
        return {
            "adapter": adapter,
            "saved state": adapter + self.accounts.optimizer_bytes,
            "merged checkpoint": merged_bytes(self.accounts),
        }


def _of_phases(phases: dict[str, int]) -> dict[str, int]:
    """The phases that are shown; a merge (`export/merge.py`) never touches the card."""
    names = ("load", "forward", "backward", "optimizer step", "evaluation", "save", "resume")
    return {name: phases[name] for name in names if name in phases} | {"merge": 0}


def simulate_run(
    config: Any,
    shape: RunShape,
    gpu: GpuProfile | None,
    *,
    model_class: Any = None,
    batch: Batch | None = None,
) -> SimulatedRun:
    """Run a configuration's step on weightless tensors, with this card's kernels.

    Args:
        config: The model's transformers configuration.
        shape: The run's settings.
        gpu: Whose compute capability decides the kernels; None for the CPU's own choices.
        model_class: In place of the task's auto class.
        batch: A collated micro-batch at hand, in place of the largest one of this shape.

    Raises:
        UserError: The model cannot have these settings, or branches on values.
    """
    card = None if gpu is None else gpu.card
    model = weightless_model(config, shape, card, model_class)
    accounts = Accounts(notes=notes_of(model, shape))
    held_out = None
    if batch is None:
        batch = full_batch(shape, model.config, model.config._attn_implementation)
        held_out = held_out_batch(shape, model.config)
    program = Program(model, shape, accounts, batch, held_out=held_out, on_cpu=card is None)
    trace = simulate(program, card, answers=ANSWERS)
    return SimulatedRun(trace, shape, accounts)


def foresee(
    config: Any,
    shape: RunShape,
    gpu: GpuProfile,
    *,
    budget_bytes: int | None = None,
    expandable_segments: bool = False,
    with_timeline: bool = False,
    model_class: Any = None,
) -> Foresight:
    """Say what one configuration will need on one card.

    Args:
        config: The model's transformers configuration.
        shape: The run's settings.
        gpu: The card.
        budget_bytes: What of the card is free for this process.
        expandable_segments: Of the allocator's configuration.
        with_timeline: Keep the course of allocated and reserved memory.
        model_class: In place of the task's auto class.

    Raises:
        UserError: The model cannot have these settings, or branches on values.
    """
    return simulate_run(config, shape, gpu, model_class=model_class).on(
        gpu, budget_bytes=budget_bytes, expandable_segments=expandable_segments,
        with_timeline=with_timeline,
    )  # fmt: skip
