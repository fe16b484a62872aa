"""How a finished export looks on a terminal: what was kept, why, and the proof."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from qlora_trainer.cli.show import out
from qlora_trainer.export.export import Exported
from qlora_trainer.export.serving import ServingNote
from qlora_trainer.units import format_bytes, format_seconds

_FIGURES = (
    ("mean_kl", "mean KL divergence (nats)", "{:.2e}"),
    ("max_kl", "largest KL divergence", "{:.2e}"),
    ("top1_agreement", "same most likely token", "{:.2%}"),
    ("max_logit_difference", "largest logit difference", "{:.3f}"),
    ("reference_perplexity", "perplexity, base + adapter", "{:.4f}"),
    ("export_perplexity", "perplexity, export", "{:.4f}"),
)


def show_export(exported: Exported) -> None:
    """The last lines of `qlora export`."""
    report = exported.report
    ways: Mapping[str, Any] = report.get("ways") or {}
    compared = {
        way: proof["figures"]
        for way, part in ways.items()
        for proof in list((part.get("proof") or {}).values())[:1]
    }
    if compared:
        rows = report["rows"]
        table = Table(
            title=f"against base + adapter, {rows['positions']} positions of {rows['from']}",
            title_justify="left",
            box=None,
        )
        table.add_column("")
        for way in compared:
            table.add_column(f"onto {way}", justify="right")
        for key, label, form in _FIGURES:
            shown = [figures.get(key) for figures in compared.values()]
            cells = ["" if figure is None else form.format(figure) for figure in shown]
            if any(cells):
                table.add_row(label, *cells)
        out.print(table)
    for way, part in ways.items():
        merge = part["merge"]
        out.print(
            f"onto {way}: {format_bytes(merge['written_bytes'])} written in "
            f"{format_seconds(merge['seconds'])}"
        )
    if report.get("reason"):
        out.print(escape(report["reason"]))
    for note in report.get("serving") or ():
        out.print(f"[yellow]serving:[/] {escape(note)}")
    for note in report.get("notes") or ():
        out.print(f"note: {escape(note)}")
    if ways and not compared:
        out.print("[yellow]not proven:[/] the comparison was left out")
    out.print(f"export        {escape(str(exported.folder))}")


def show_serving(notes: Sequence[ServingNote]) -> None:
    """What servers cannot do with the adapter as planned; nothing where there is nothing."""
    for note in notes:
        out.print(f"[yellow]serving:[/] {escape(str(note))}")
