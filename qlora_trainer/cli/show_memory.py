"""How a memory prediction looks on a terminal, and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from qlora_trainer.cli.show import out
from qlora_trainer.memory.foresight import Foresight
from qlora_trainer.units import format_bytes

_COLOURS = {"fits": "green", "tight": "yellow", "does not fit": "bold red"}
_ALIVE = 12


def foresight_json(foresight: Foresight) -> dict[str, Any]:
    """All of a prediction as plain data, the verdict included."""
    content = asdict(foresight)
    content.pop("timeline")
    return {"verdict": foresight.verdict, "total_bytes": foresight.total_bytes, **content}


def show_foresight(foresight: Foresight, *, as_json: bool) -> None:
    """One configuration: the verdict, what holds the memory, and which lines made it."""
    if as_json:
        out.print_json(json.dumps(foresight_json(foresight)))
        return
    colour = _COLOURS[foresight.verdict]
    out.print(
        f"[{colour}]{foresight.verdict}[/]: {format_bytes(foresight.total_bytes)} of "
        f"{format_bytes(foresight.capacity_bytes)} on {escape(foresight.gpu)}"
    )
    out.print(
        f"  peak allocated  {format_bytes(foresight.allocated_bytes)}, in {foresight.peak_phase}\n"
        f"  peak reserved   {format_bytes(foresight.reserved_bytes)}\n"
        f"  CUDA context    {format_bytes(foresight.context_bytes)} (assumed for this card)\n"
        f"  paged to host   {format_bytes(foresight.paged_bytes)}\n"
        f"  host RAM        {format_bytes(foresight.host_bytes)}"
    )
    if not foresight.fits_without_retry and foresight.fits:
        out.print("  it fits only because the allocator gives cached memory back, which costs time")
    _show_sizes("by component, at the peak", foresight.by_component)
    _show_sizes("peak by phase", foresight.allocated_by_phase)
    _show_sizes("on disk", foresight.disk_bytes)
    if foresight.large_unquantized:
        _show_sizes("large weights outside NF4", foresight.large_unquantized)
    table = Table(title="\nlargest tensors at the peak", title_justify="left", box=None)
    for column in ("together", "tensors", "what", "made by"):
        table.add_column(column, justify="right" if column in ("together", "tensors") else "left")
    for tensor in foresight.alive[:_ALIVE]:
        table.add_row(
            format_bytes(tensor.total_bytes),
            f"{tensor.count:,}",
            escape(tensor.component),
            escape(tensor.where),
        )
    out.print(table)
    kernels = ", ".join(f"{name} {count}x" for name, count in foresight.kernels.items())
    out.print(f"\nkernels: {escape(kernels) or 'none chosen'}")


def show_sweep(found: Sequence[tuple[tuple[str, ...], Foresight]], *, as_json: bool) -> None:
    """Many configurations, a line each."""
    if as_json:
        listed = [{"settings": list(c), **foresight_json(f)} for c, f in found]
        out.print_json(json.dumps(listed))
        return
    table = Table(box=None)
    for column in ("settings", "allocated", "reserved", "with context", "verdict"):
        table.add_column(column, justify="left" if column in ("settings", "verdict") else "right")
    for changed, foresight in found:
        table.add_row(
            escape(" ".join(changed)),
            format_bytes(foresight.allocated_bytes),
            format_bytes(foresight.reserved_bytes),
            format_bytes(foresight.total_bytes),
            f"[{_COLOURS[foresight.verdict]}]{foresight.verdict}[/]",
        )
    out.print(table)


def _show_sizes(title: str, sizes: dict[str, int]) -> None:
    table = Table(title=f"\n{title}", title_justify="left", box=None, show_header=False)
    table.add_column(justify="right")
    table.add_column()
    for name, size in sizes.items():
        if size:
            table.add_row(format_bytes(size), escape(name))
    out.print(table)
