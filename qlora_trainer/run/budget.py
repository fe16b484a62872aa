"""What of a card a run may have: what is free on the one here, what is usable of one that is not.

Memory that `mem_get_info` calls free leaves out the desktop already. Of a card known by its profile
alone the desktop's share is an assumption, and is said with the verdict.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from qlora_trainer.base.machine import choose_device, windows_driver
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError
from qlora_trainer.memory.allocator_settings import (
    AllocatorSettings,
    allocator_settings,
    configured,
)
from qlora_trainer.memory.gpus import GpuProfile, gpu_of_this_machine, read_gpu
from qlora_trainer.units import format_bytes, parse_bytes

# Measured by nobody here: desktop, browser and compositor of Windows hold 0.5 to 1.5 GiB, of a
# card that WSL uses too.
_WINDOWS_DESKTOP_BYTES = 2**30
_WINDOWS_NOTE = (
    "on Windows and WSL the driver spills into RAM silently instead of failing, and steps become "
    "many times slower: turn off sysmem fallback in the driver's panel (WSL may not heed it); "
    "paged optimizer states count on the card there"
)
_COMPILED_NOTE = (
    "train.compile = true: the step is foreseen operator by operator; what compiled kernels "
    "save is not counted"
)
_NOT_ELSEWHERE = "is of this machine and counts for its own card, not for one named by --gpu"


@dataclass(frozen=True)
class Card:
    """A card, and what was said or found to be free of it.

    Attributes:
        gpu: Its profile.
        free_bytes: Free for this process; None where only the profile is known.
        free_because: Where that number comes from.
        processes: How many make the run together, each on such a card.
        is_here: It is a card of this machine, not of a profile.
    """

    gpu: GpuProfile
    free_bytes: int | None
    free_because: str
    processes: int = 1
    is_here: bool = False


@dataclass(frozen=True)
class Budget:
    """What a run may have of a card.

    Attributes:
        gpu: The card.
        budget_bytes: For this process, its CUDA context included.
        paged_on_card: Managed memory counts on the card (Windows, WSL).
        notes: Where the number comes from, what the system makes of it, what is not counted.
        processes: How many make the run together, each on such a card.
        expandable_segments: Of the allocator's configuration, for a card of this machine; of one
            known by its profile the allocator has its defaults.
    """

    gpu: GpuProfile
    budget_bytes: int
    paged_on_card: bool
    notes: tuple[str, ...]
    processes: int = 1
    expandable_segments: bool = False


def choose_card(
    key: str | None, free: str | None, processes: int = 1, *, device: str = "auto"
) -> Card:
    """The card to foresee for.

    Args:
        key: A card's profile; None takes the one here that the run would take.
        free: What of it is free, such as `7.5 GiB`; None takes what is free now, or its profile.
        processes: How many make the run together, each on such a card.
        device: `model.device` of the run; says nothing of a card named by its profile.

    Raises:
        UserError: No such card, no such device here, a device that is no card, or the budget is no
            size.
    """
    try:
        free_bytes = None if free is None else parse_bytes(free)
    except ValueError as error:
        raise UserError(f"--budget: {error}") from None
    if free_bytes == 0:
        raise UserError("--budget: nothing fits into 0 bytes")
    if key is not None:
        return Card(read_gpu(key), free_bytes, "--budget", processes)
    try:
        here = gpu_of_this_machine(choose_device(device))
    except ValueError as error:
        raise UserError(f"model.device = {device!r}: {error}; or name a card with --gpu") from None
    if here is None and device != "auto":
        raise UserError(
            f"model.device = {device!r}: is no card to foresee for; name one with --gpu"
        )
    if here is None:
        raise UserError("there is no GPU here to foresee for; name one with --gpu")
    if free_bytes is not None:
        return Card(here[0], free_bytes, "--budget", processes, is_here=True)
    return Card(here[0], here[1], "free now", processes, is_here=True)


def budget_of(
    card: Card,
    run: RunConfig,
    *,
    windows: bool | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Budget:
    """What a run may have of a card.

    Args:
        card: From `choose_card`.
        run: Its `memory.desktop_share` is taken from a card known by its profile alone.
        windows: Whether Windows or WSL has the card where it is going to run; None: as here.
        environment: Variables of this process; the allocator's configuration is read from them.

    Raises:
        UserError: The desktop leaves nothing.
    """
    windows = windows_driver() if windows is None else windows
    notes = [_WINDOWS_NOTE] if windows else []
    notes += [_COMPILED_NOTE] if run.train.compile else []
    allocator = allocator_settings(environment) if card.is_here else AllocatorSettings()
    notes += [] if allocator.note is None else [allocator.note]
    elsewhere = None if card.is_here else configured(environment)
    notes += [] if elsewhere is None else [f"{elsewhere[0]} {_NOT_ELSEWHERE}"]
    if card.free_bytes is not None:
        notes.insert(
            0, f"{format_bytes(card.free_bytes)} of the card for the run: {card.free_because}"
        )
        return Budget(
            card.gpu, card.free_bytes, windows, tuple(notes), card.processes,
            allocator.expandable_segments,
        )  # fmt: skip
    share, why = _desktop_share(run, windows)
    budget = card.gpu.usable_bytes - share
    if budget <= 0:
        raise UserError(
            f"memory.desktop_share = {run.memory.desktop_share!r}: {card.gpu.name} has "
            f"{format_bytes(card.gpu.usable_bytes)}; take less"
        )
    notes.insert(0, f"of the card's {format_bytes(card.gpu.usable_bytes)} the desktop has {why}")
    return Budget(card.gpu, budget, windows, tuple(notes), card.processes)


def _desktop_share(run: RunConfig, windows: bool) -> tuple[int, str]:
    given = run.memory.desktop_share
    if given is not None:
        share = parse_bytes(given)
        return share, f"{format_bytes(share)} (memory.desktop_share)"
    if windows:
        share = _WINDOWS_DESKTOP_BYTES
        return share, f"{format_bytes(share)} (assumed on Windows and WSL; --desktop-share sets it)"
    return 0, "nothing (assumed here; --desktop-share '1 GiB' if a screen is on it)"
