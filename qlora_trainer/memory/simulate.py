"""Run any step on weightless tensors and ask any card's allocator what it would have taken.

`simulate` runs a program under the tracker and keeps the log as a `Trace`; `Trace.replay` sends it
through the allocator model at a capacity. One log answers for many cards: a replay takes tens of
milliseconds, a simulation seconds.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_trainer.memory.allocator import CachingAllocator, OutOfMemory
from qlora_trainer.memory.blocks import Block
from qlora_trainer.memory.cuda_rules import CudaRules
from qlora_trainer.memory.gpus import Gpu
from qlora_trainer.memory.log import (
    ALLOCATE,
    EMPTY_CACHE,
    FREE,
    PHASE,
    RECORD_STREAM,
    RESET_PEAK,
    SYNCHRONIZE,
    Log,
)
from qlora_trainer.memory.tracker import AllocationTracker, UnforeseeableOperator


@dataclass(frozen=True)
class LiveTensor:
    """A storage alive at the peak, with how many like it (same line, size, component)."""

    component: str
    operator: str
    where: str
    phase: str
    size_bytes: int
    count: int

    @property
    def total_bytes(self) -> int:
        """Of all alike."""
        return self.size_bytes * self.count


@dataclass
class Peaks:
    """What one replay found; all sizes as torch.cuda's statistics count them."""

    allocated_bytes: int = 0
    reserved_bytes: int = 0
    fits: bool = True
    wanted_bytes: int = 0  # of the request that failed, when it does not fit
    retries: int = 0
    after_phase: dict[str, int] = field(default_factory=dict)  # allocated when the phase ended
    allocated_by_phase: dict[str, int] = field(default_factory=dict)
    reserved_by_phase: dict[str, int] = field(default_factory=dict)
    by_component: dict[str, int] = field(default_factory=dict)  # at the peak, tensors' own bytes
    peak_phase: str = ""
    alive: list[LiveTensor] = field(default_factory=list)
    timeline: list[tuple[int, int, str]] = field(default_factory=list)


@dataclass
class Live:
    """Peaks of live storages, without an allocator."""

    peak_bytes: int = 0
    by_component: dict[str, int] = field(default_factory=dict)
    by_phase: dict[str, int] = field(default_factory=dict)


def _live(log: Log) -> Live:
    found, now, phase = Live(), 0, "start"
    components: dict[str, int] = {}
    for kind, about in log.events:
        if kind == PHASE:
            phase = str(about)
        elif kind == RESET_PEAK:
            found = Live(now, dict(components), {})
        elif kind in (ALLOCATE, FREE):
            record = log.allocations[int(about)]
            size = record.size_bytes if kind == ALLOCATE else -record.size_bytes
            now += size
            components[record.component] = components.get(record.component, 0) + size
            if now > found.peak_bytes:
                found.peak_bytes, found.by_component = now, dict(components)
        found.by_phase[phase] = max(found.by_phase.get(phase, 0), now)
    return found


@dataclass
class Trace:
    """The log of one simulated program."""

    log: Log

    @classmethod
    def empty(cls) -> "Trace":
        """A trace of nothing."""
        return cls(Log())

    def live(self) -> "Live":
        """Peaks of the storages' own bytes, with no allocator: what a CPU's memory must hold."""
        return _live(self.log)

    def replay(
        self,
        capacity_bytes: int | None = None,
        *,
        expandable_segments: bool = False,
        with_timeline: bool = False,
    ) -> Peaks:
        """Peaks of this program on a card with `capacity_bytes` beside its context."""
        return _Replay(self.log, capacity_bytes, expandable_segments, with_timeline).run()


class _Replay:
    """One pass of a log through an allocator, remembering what was alive at the peak."""

    def __init__(
        self, log: Log, capacity: int | None, expandable: bool, with_timeline: bool
    ) -> None:
        self.log = log
        self.allocator = CachingAllocator(capacity, expandable)
        self.blocks: dict[int, Block] = {}
        self.peaks = Peaks()
        self.phase = "start"
        self.with_timeline = with_timeline
        self._highest = 0  # since the last reset; where the peak's event is
        self._peak_event = 0

    def run(self) -> Peaks:
        allocator, blocks, peaks = self.allocator, self.blocks, self.peaks
        allocations = self.log.allocations
        for position, (kind, about) in enumerate(self.log.events):
            if kind == ALLOCATE:
                index = int(about)
                record = allocations[index]
                if record.on_host:
                    continue
                try:
                    blocks[index] = allocator.allocate(record.size_bytes, record.stream)
                except OutOfMemory as full:
                    peaks.fits, peaks.wanted_bytes = False, full.wanted_bytes
                    self._peak_event = position
                    break
                self._note_peak(position)
            elif kind == FREE:
                block = blocks.pop(int(about), None)
                if block is not None:
                    allocator.free(block)
            else:
                self._other(kind, about)
            if self.with_timeline and kind in (ALLOCATE, FREE):
                peaks.timeline.append(
                    (allocator.allocated_bytes, allocator.reserved_bytes, self.phase)
                )
        self._end_phase()
        peaks.allocated_bytes = allocator.peak_allocated_bytes
        peaks.reserved_bytes = allocator.peak_reserved_bytes
        peaks.retries = allocator.retries
        self._describe_peak()
        return peaks

    def _other(self, kind: int, about: int | str) -> None:
        allocator = self.allocator
        if kind == PHASE:
            self._end_phase()
            self.phase = str(about)
            self._phase_peaks()
        elif kind == EMPTY_CACHE:
            allocator.empty_cache()
        elif kind == RESET_PEAK:
            allocator.reset_peaks()
            self._highest = 0
        elif kind == SYNCHRONIZE:
            allocator.synchronize(int(about))
        elif kind == RECORD_STREAM:
            index, stream = divmod(int(about), 16)
            if index in self.blocks:
                allocator.record_stream(self.blocks[index], stream)

    def _end_phase(self) -> None:
        self._phase_peaks()
        self.peaks.after_phase[self.phase] = self.allocator.allocated_bytes

    def _phase_peaks(self) -> None:
        peaks, allocator, phase = self.peaks, self.allocator, self.phase
        peaks.allocated_by_phase[phase] = max(
            peaks.allocated_by_phase.get(phase, 0), allocator.allocated_bytes
        )
        peaks.reserved_by_phase[phase] = max(
            peaks.reserved_by_phase.get(phase, 0), allocator.reserved_bytes
        )

    def _note_peak(self, position: int) -> None:
        now = self.allocator.allocated_bytes
        phases = self.peaks.allocated_by_phase
        if now > phases.get(self.phase, 0):
            phases[self.phase] = now
            self._phase_peaks()
        if now > self._highest:
            self._highest, self._peak_event = now, position

    def _describe_peak(self) -> None:
        alive: set[int] = set()
        phase = "start"
        for kind, about in self.log.events[: self._peak_event + 1]:
            if kind == ALLOCATE:
                alive.add(int(about))
            elif kind == FREE:
                alive.discard(int(about))
            elif kind == PHASE:
                phase = str(about)
        self.peaks.peak_phase = phase
        groups: dict[tuple[str, str, str, str, int], int] = {}
        for index in alive:
            record = self.log.allocations[index]
            if record.on_host:
                continue
            self.peaks.by_component[record.component] = (
                self.peaks.by_component.get(record.component, 0) + record.size_bytes
            )
            key = (record.component, record.operator, record.where, record.phase, record.size_bytes)
            groups[key] = groups.get(key, 0) + 1
        self.peaks.alive = sorted(
            (LiveTensor(*key, count) for key, count in groups.items()),
            key=lambda tensor: -tensor.total_bytes,
        )


def simulate(
    program: Callable[[AllocationTracker], Any],
    gpu: Gpu | None,
    *,
    answers: Mapping[str, Any] | None = None,
) -> Trace:
    """Run `program` on weightless tensors as if they were on `gpu`.

    Args:
        program: Builds and steps; everything it puts on `meta` counts as the card's memory. It is
            given the tracker, to mark phases and components.
        gpu: The card whose kernels are chosen; None for a CPU, which has no such rules.
        answers: See `AllocationTracker`.

    Raises:
        UserError: An operator has no weightless implementation, or shapes do not go together.
    """
    tracker = AllocationTracker(
        "meta", CudaRules(gpu).table() if gpu is not None else None, answers
    )
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection at a random moment would move deaths; reference counting decides
    try:
        with tracker:
            program(tracker)
    except RuntimeError as error:  # torch names the operator
        reason = str(error).partition("\n")[0]
        raise UnforeseeableOperator(
            f"memory foresight: this model's step does not run on weightless tensors: {reason}; "
            "where its config.json is right, measure it with `--measure` instead"
        ) from error
    finally:
        if collecting:
            gc.enable()
        tracker.close()
    return Trace(tracker.log)
