"""Is there room for a run: on the card, in host memory, on the disk; and the way out if not.

Each function says in one line what is foreseen of what is there, and returns what is lacking, with
the mildest change that would do, ready as `--set` flags.
"""

from pathlib import Path
from typing import Any

import psutil

from qlora_trainer.base.machine import free_disk_bytes, host_memory_bytes, windows_driver
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError
from qlora_trainer.memory.artefacts import disk_peak_bytes
from qlora_trainer.memory.fit import Fitter
from qlora_trainer.memory.foresight import SimulatedRun
from qlora_trainer.memory.gpus import GpuProfile
from qlora_trainer.memory.program import RunShape
from qlora_trainer.run.report import Reporter
from qlora_trainer.training import setup
from qlora_trainer.units import format_bytes

_STEP_ROOM_BYTES = 64 * 2**20  # tokenizer, metrics, pictures and logs beside adapters and states


def room_on_card(
    simulated: SimulatedRun,
    config: Any,
    shape: RunShape,
    here: tuple[GpuProfile, int],
    told: Reporter,
    *,
    rehearsed: bool,
    sharing: int = 1,
    expandable_segments: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Numbers for `memory.json`, and what is lacking of a card and of host memory.

    Host memory is shared by so many processes on this machine. Segments that expand are of the
    allocator's configuration.
    """
    gpu, free = here
    windows = windows_driver()
    found = simulated.on(
        gpu, budget_bytes=free, expandable_segments=expandable_segments, paged_on_card=windows
    )
    told.say(
        f"memory: {format_bytes(found.total_bytes)} foreseen of {format_bytes(free)} free on "
        f"{gpu.name}, most in {found.peak_phase}: {found.verdict}"
    )
    faults = []
    if not found.fits:
        fitter = Fitter(
            config, shape, gpu, budget_bytes=free, expandable_segments=expandable_segments,
            paged_on_card=windows,
        )  # fmt: skip
        faults.append(
            f"the card: {format_bytes(found.total_bytes)} needed, {format_bytes(free)} free; "
            + _way_out(fitter)
        )
    free_ram = host_memory_bytes()[1] // sharing
    most = max(found.host_bytes, found.host_bytes_by_phase["rehearsal" if rehearsed else "save"])
    more = most - psutil.Process().memory_info().rss
    if more > free_ram:
        faults.append(
            f"host memory: {format_bytes(more)} more needed, {format_bytes(free_ram)} available; "
            "close other programs, or take train.optimizer=adamw_8bit"
        )
    return {
        "allocated_bytes": found.allocated_bytes,
        "reserved_bytes": found.reserved_bytes,
        "paged_bytes": found.paged_bytes,
        "host_bytes": found.host_bytes,
        "host_bytes_by_phase": found.host_bytes_by_phase,
        "peak_phase": found.peak_phase,
        "by_component": found.by_component,
        "allocated_by_phase": found.allocated_by_phase,
    }, faults


def room_on_cpu(
    simulated: SimulatedRun, config: Any, shape: RunShape, told: Reporter, *, sharing: int = 1
) -> tuple[dict[str, Any], list[str]]:
    """Numbers for `memory.json`, and what is lacking of host memory, where the run computes."""
    total, free = (size // sharing for size in host_memory_bytes())
    live = simulated.trace.live()
    peak = max(live.peak_bytes, *live.by_phase.values())
    told.say(
        f"memory: {format_bytes(peak)} foreseen for base, adapters and batches, of "
        f"{format_bytes(free)} available RAM"
        + (f" for each of {sharing} processes" if sharing > 1 else "")
    )
    faults = []
    if peak > free:
        host = GpuProfile("cpu", "this machine's RAM", total, free, 0, (0, 0), 0)
        fitter = Fitter(config, shape, host, budget_bytes=free, paged_on_card=True, on_cpu=True)
        faults.append(
            f"host memory: {format_bytes(peak)} needed, {format_bytes(free)} available; "
            + _way_out(fitter)
        )
    return {
        "live_bytes": peak,
        "by_component": live.by_component,
        "live_by_phase": live.by_phase,
    }, faults


def _way_out(fitter: Fitter) -> str:
    """The mildest change that fits, simulated, as flags; or that there is none."""
    try:
        change = fitter.smallest_change()
    except UserError as error:
        return str(error)
    if change is None:
        return "close other programs"
    flags = " ".join(f"--set {setting}" for setting in change.overrides)
    return f"{change.what} would fit ({format_bytes(change.foresight.total_bytes)}): {flags}"


def room_on_disk(run: RunConfig, simulated: SimulatedRun, told: Reporter) -> list[str]:
    """What is lacking for states kept and the one being written, and for adapters likewise.

    The merged export is no part of a run and may go elsewhere: it is told, and refuses nothing.
    """
    most = disk_peak_bytes(simulated.accounts, run.output.keep_last)
    folder = Path(run.output.folder).expanduser()
    standing = sum(f.stat().st_size for f in folder.glob("states/*/*") if f.is_file())
    needed = most["saved states"] + most["adapters"] + _STEP_ROOM_BYTES - standing
    free = free_disk_bytes(folder)
    merged = most["merged export"]
    room = "" if needed + merged <= free else ", for which there is no room"
    told.say(
        f"disk: up to {format_bytes(max(needed, 0))} more for {run.output.keep_last} saved states "
        f"and the adapter, of {format_bytes(free)} free; a merged export takes "
        f"{format_bytes(merged)} more{room}"
    )
    if needed <= free:
        return []
    return [
        f"the disk of {folder}: {format_bytes(needed)} needed, {format_bytes(free)} free; make "
        "room, name another output.folder, or --set output.keep_last=1"
    ]


def disk_of_all(run: RunConfig, simulated: SimulatedRun, data: setup.RunData) -> dict[str, int]:
    """Artefact -> bytes, the encoded rows included, which are written by now."""
    stores = {rows.store.folder for rows in (data.train, data.held_out) if rows is not None}
    rows = sum(f.stat().st_size for store in stores for f in store.rglob("*") if f.is_file())
    return {**disk_peak_bytes(simulated.accounts, run.output.keep_last), "encoded rows": rows}
