"""The report's tables: verdicts, tensors at the peak, phases, disk, predicted beside measured."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from qlora_trainer.memory.foresight import Foresight
from qlora_trainer.memory.picture_data import made_by
from qlora_trainer.units import format_bytes


@dataclass(frozen=True)
class Pair:
    """One line of predicted beside measured, in bytes."""

    name: str
    predicted_bytes: int
    measured_bytes: int


def verdicts(found: Mapping[str, Foresight], measured: Mapping[str, int]) -> str:
    """A line per configuration."""
    heads = [
        "configuration",
        "allocated",
        "reserved",
        "CUDA context",
        "total",
        "host RAM",
        "verdict",
    ]
    if measured:
        heads.append("measured reserved")
    rows = []
    for name, item in found.items():
        sizes = [
            item.allocated_bytes,
            item.reserved_bytes,
            item.context_bytes,
            item.total_bytes,
            item.host_peak_bytes,
        ]
        style = {"fits": "", "tight": "tight", "does not fit": "bad"}[item.verdict]
        row = [escape(name), *map(format_bytes, sizes)]
        row.append(f'<span class="{style}">{item.verdict}</span>')
        if measured:
            row.append(format_bytes(measured[name]) if name in measured else "-")
        rows.append(row)
    return _table(heads, rows, (1, 2, 3, 4, 5, 7))


def tensors(found: Foresight) -> str:
    """The largest tensors at the peak, and the lines that made them."""
    rows = [
        [
            format_bytes(tensor.total_bytes),
            f"{tensor.count:,}",
            escape(tensor.component),
            escape(tensor.operator),
            escape(made_by(tensor)),
        ]
        for tensor in found.alive[:25]
    ]
    return _table(["together", "tensors", "component", "operator", "made by"], rows, (0, 1))


def phases(found: Foresight) -> str:
    """Peak of each phase: of the card, where the phase touches it, and of host RAM."""
    rows = []
    for phase, host in found.host_bytes_by_phase.items():
        card = found.allocated_by_phase.get(phase)
        rows.append(
            [escape(phase), "-" if card is None else format_bytes(card), format_bytes(host)]
        )
    return _table(["phase", "allocated", "host RAM"], rows, (1, 2))


def disk(found: Foresight) -> str:
    """Most bytes of each artefact at one time."""
    rows = [[escape(name), format_bytes(size)] for name, size in found.disk_peak_bytes.items()]
    return _table(["artefact", "at most"], rows, (1,))


def pairs_table(pairs: Sequence[Pair]) -> str:
    """Predicted beside measured."""
    rows = []
    for pair in pairs:
        measured = pair.measured_bytes
        error = f"{pair.predicted_bytes / measured - 1:+.2%}" if measured else "-"
        sizes = (format_bytes(pair.predicted_bytes), format_bytes(measured))
        rows.append([escape(pair.name), *sizes, error])
    return _table(["", "predicted", "measured", "difference"], rows, (1, 2, 3))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int]) -> str:
    """A table whose rows become lists on a narrow screen; cells are HTML already."""

    def style(column: int) -> str:
        return ' class="n"' if column in numbers else ""

    head = "".join(f"<th{style(i)}>{text}</th>" for i, text in enumerate(heads))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td{style(i)} data-of="{heads[i]}"><span>{cell}</span></td>'
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f'<table class="wide"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
