"""How a memory prediction looks on a terminal, and as JSON."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from qlora_trainer.cli.show import out
from qlora_trainer.memory.foresight import Foresight
from qlora_trainer.memory.picture_data import made_by
from qlora_trainer.run.budget import Budget
from qlora_trainer.run.fit import Answer
from qlora_trainer.run.measure import Comparison
from qlora_trainer.units import format_bytes

_COLOURS = {"fits": "green", "tight": "yellow", "does not fit": "bold red"}
_ALIVE = 12


def foresight_json(foresight: Foresight) -> dict[str, Any]:
    """All of a prediction as plain data, the verdict included."""
    content = asdict(foresight)
    content.pop("timeline")
    return {
        "verdict": foresight.verdict,
        "total_bytes": foresight.total_bytes,
        "host_peak_bytes": foresight.host_peak_bytes,
        "large_unquantized_total_bytes": sum(foresight.large_by_path.values()),
        "large_unquantized_by_path": foresight.large_by_path,
        **content,
    }


def show_foresight(foresight: Foresight, *, as_json: bool, notes: Sequence[str] = ()) -> None:
    """One configuration: the verdict, what holds the memory, and which lines made it."""
    if as_json:
        out.print_json(json.dumps(foresight_json(foresight) | {"notes": list(notes)}))
        return
    colour = _COLOURS[foresight.verdict]
    out.print(
        f"[{colour}]{foresight.verdict}[/]: {format_bytes(foresight.total_bytes)} of "
        f"{format_bytes(foresight.capacity_bytes)} on {escape(foresight.gpu)}"
    )
    large = foresight.large_by_path
    if large:
        out.print(f"  {format_bytes(sum(large.values()))} are large weights outside NF4:")
        for name, size in large.items():
            out.print(f"    {format_bytes(size):>10}  {escape(name)}")
    show_notes(notes)
    out.print(
        f"  peak allocated  {format_bytes(foresight.allocated_bytes)}, in {foresight.peak_phase}\n"
        f"  peak reserved   {format_bytes(foresight.reserved_bytes)}\n"
        f"  CUDA context    {format_bytes(foresight.context_bytes)} (assumed for this card)\n"
        f"  paged states    {format_bytes(foresight.paged_bytes)}, "
        f"{'which count on the card' if foresight.paged_on_card else 'in host RAM'}\n"
        f"  host RAM        {format_bytes(foresight.host_peak_bytes)}"
    )
    if foresight.loss_chunk_tokens is not None:
        out.print(f"  loss            logits of {foresight.loss_chunk_tokens:,} tokens at one time")
    if foresight.processes > 1:
        count = foresight.processes
        out.print(
            f"  {count} processes     each takes this of its card; on one machine together "
            f"{format_bytes(count * foresight.host_peak_bytes)} of host RAM"
        )
    if foresight.gathered_bytes:
        out.print(
            f"  layers in parts {format_bytes(foresight.part_bytes)} here, two more whole at most; "
            f"{format_bytes(foresight.gathered_bytes)} from the others a step, "
            f"{foresight.gathering_seconds:.1f} s at 12 GB/s (assumed), beside the computing\n"
            "                  NCCL's own buffers are outside torch and not counted: leave some "
            "0.3 GiB (estimated, not measured)"
        )
    if foresight.pinned_bytes:
        out.print(
            f"  pinned host     {format_bytes(foresight.pinned_bytes)} of layer inputs, layers or "
            "head"
        )
    if foresight.moved_bytes:
        out.print(
            f"  over PCIe       {format_bytes(foresight.moved_bytes)} a step, "
            f"{foresight.moving_seconds:.1f} s at 12 GB/s, beside the computing (but for head and "
            "embeddings)"
        )
        if foresight.paged_bytes:
            out.print("                  not what the driver pages of optimizer states")
    if not foresight.fits_without_retry and foresight.fits:
        out.print("  it fits only because the allocator gives cached memory back, which costs time")
    _show_sizes("by component, at the peak", foresight.by_component)
    _show_phases(foresight)
    _show_sizes("on disk at most", foresight.disk_peak_bytes)
    table = Table(title="\nlargest tensors at the peak", title_justify="left", box=None)
    for column in ("together", "tensors", "what", "made by"):
        table.add_column(column, justify="right" if column in ("together", "tensors") else "left")
    for tensor in foresight.alive[:_ALIVE]:
        table.add_row(
            format_bytes(tensor.total_bytes),
            f"{tensor.count:,}",
            escape(tensor.component),
            escape(made_by(tensor)),
        )
    out.print(table)
    kernels = ", ".join(f"{name} {count}x" for name, count in foresight.kernels.items())
    out.print(f"\nkernels: {escape(kernels) or 'none chosen'}")
    for operator, most_bytes in foresight.bounded.items():
        out.print(
            f"{escape(operator)} has no weightless implementation: its inner memory is counted as "
            f"{format_bytes(most_bytes)}, and the peak may be off by as much"
        )


def show_sweep(
    found: Sequence[tuple[tuple[str, ...], Foresight]],
    *,
    as_json: bool,
    notes: Sequence[str] = (),
) -> None:
    """Many configurations, a line each."""
    if as_json:
        listed = [{"settings": list(c), **foresight_json(f)} for c, f in found]
        out.print_json(json.dumps(listed))
        return
    first = found[0][1]
    out.print(f"{escape(first.gpu)}, {format_bytes(first.capacity_bytes)} for the run")
    show_notes(notes)
    names = [change.partition("=")[0] for change in found[0][0]]
    table = _table(*(name.rpartition(".")[2] for name in names), *_COLUMNS)
    for changed, foresight in found:
        values = [escape(change.partition("=")[2]) for change in changed]
        table.add_row(*values, *_cells(foresight))
    out.print(table)


def show_answers(answers: Sequence[Answer], budget: Budget, *, as_json: bool) -> None:
    """What fits a card, a line each, with the flags that make it so."""
    if as_json:
        listed = []
        for a in answers:
            predicted = None if a.foresight is None else foresight_json(a.foresight)
            listed.append(
                {"question": a.question, "found": a.found, "settings": list(a.overrides),
                 "because": a.because, "predicted": predicted}
            )  # fmt: skip
        out.print_json(json.dumps(listed))
        return
    out.print(f"{escape(budget.gpu.name)}, {format_bytes(budget.budget_bytes)} for the run")
    foreseen = (a.foresight.notes for a in answers if a.foresight is not None)
    show_notes(dict.fromkeys(note for notes in (budget.notes, *foreseen) for note in notes))
    for a in answers:
        said = escape(f"{a.question:<7} {a.found}")
        if a.foresight is None:
            out.print(f"{said}: {escape(a.because)}")
            continue
        found = a.foresight
        out.print(
            f"{said}: [{_COLOURS[found.verdict]}]{found.verdict}[/], "
            f"{format_bytes(found.total_bytes)}{escape(f'; {a.because}' if a.because else '')}"
        )
        if a.overrides:
            out.print(escape(f"{'':<8}" + " ".join(f"--set {change}" for change in a.overrides)))


def show_comparison(compared: Comparison, *, as_json: bool) -> None:
    """Predicted beside measured, component by component."""
    if as_json:
        out.print_json(json.dumps(compared.to_json()))
        return
    out.print(f"two real steps on {compared.device}; allocated is {compared.what}")
    table = _table("", "predicted", "measured", "difference", right=(1, 2, 3))
    for name, predicted in compared.predicted.items():
        _add_pair(table, f"peak {name}", predicted, compared.measured[name])
    _add_pairs(table, "at the peak", compared.predicted_by_component,
               compared.measured_by_component)  # fmt: skip
    _add_pairs(table, "peak by phase", compared.predicted_by_phase, compared.measured_by_phase)
    out.print(table)
    if compared.resident_bytes is not None:
        out.print(
            f"\nresident memory of the process grew by {format_bytes(compared.resident_bytes)} at "
            "most: storages, what the C library keeps, and pages mapped from the checkpoint"
        )


def show_notes(notes: Iterable[str]) -> None:
    """What to know beside a verdict, indented."""
    for note in notes:
        out.print(f"  [dim]{escape(note)}[/]")


_COLUMNS = ("allocated", "reserved", "total", "verdict")


def _cells(foresight: Foresight) -> list[str]:
    return [
        format_bytes(foresight.allocated_bytes),
        format_bytes(foresight.reserved_bytes),
        format_bytes(foresight.total_bytes),
        f"[{_COLOURS[foresight.verdict]}]{foresight.verdict}[/]",
    ]


def _table(*columns: str, right: Sequence[int] = ()) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        is_size = number in right or column in _COLUMNS[:3]
        table.add_column(column, justify="right" if is_size else "left")
    return table


def _add_pairs(
    table: Table, title: str, predicted: dict[str, int], measured: dict[str, int]
) -> None:
    """Rows of what both have; what only one has cannot be compared."""
    table.add_row(f"[bold]{title}[/]")
    for name in sorted(predicted.keys() & measured.keys(), key=lambda n: -measured[n]):
        if predicted[name] or measured[name]:
            _add_pair(table, name, predicted[name], measured[name])


def _add_pair(table: Table, name: str, predicted: int, measured: int) -> None:
    error = f"{predicted / measured - 1:+.2%}" if measured else "-"
    table.add_row(name, format_bytes(predicted), format_bytes(measured), error)


def _show_phases(foresight: Foresight) -> None:
    """Of the card (where the phase touches it) and of host RAM."""
    table = Table(title="\npeak by phase", title_justify="left", box=None)
    for column in ("allocated", "host RAM", ""):
        table.add_column(column, justify="right" if column else "left")
    for phase, host in foresight.host_bytes_by_phase.items():
        card = foresight.allocated_by_phase.get(phase)
        table.add_row("" if card is None else format_bytes(card), format_bytes(host), phase)
    out.print(table)


def _show_sizes(title: str, sizes: dict[str, int]) -> None:
    table = Table(title=f"\n{title}", title_justify="left", box=None, show_header=False)
    table.add_column(justify="right")
    table.add_column()
    for name, size in sizes.items():
        if size:
            table.add_row(format_bytes(size), escape(name))
    out.print(table)
