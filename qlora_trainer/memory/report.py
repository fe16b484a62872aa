"""The prediction as a picture: one self-contained HTML page, readable on a phone and in print.

Stacked bars of each configuration against the card's line, the memory timeline of a step with its
phases, the tensors at the peak. Plain SVG and tables: no script, no network, nothing to install.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from qlora_trainer.memory.foresight import Foresight
from qlora_trainer.units import format_bytes

_COLOURS = {
    "base weights": "#33658a", "quantization state": "#86bbd8", "embeddings and heads": "#2f4858",
    "norms and other": "#9aa5b1", "adapters": "#f6ae2d", "gradients": "#f26419",
    "optimizer states": "#a23b72", "kept activations": "#6a994e", "recomputed layer": "#a7c957",
    "backward temporaries": "#bc4749", "dequantized weights": "#5e548e",
    "logits and loss": "#e07a5f", "workspaces": "#3d405b", "cached, not in use": "#e5e5e5",
    "CUDA context": "#bdbdbd",
}  # fmt: skip
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:60rem;padding:1rem;color:#222;
background:#fff}
h1{font-size:1.5rem}
h2{font-size:1.15rem;margin-top:2rem}
svg{width:100%;height:auto}
table{border-collapse:collapse;width:100%;font-size:.85rem}
td,th{text-align:left;padding:.25rem .5rem;border-bottom:1px solid #ddd;overflow-wrap:anywhere}
td.n,th.n{text-align:right;white-space:nowrap}
.key{display:inline-block;margin:0 .9rem .3rem 0;font-size:.85rem}
.key i{display:inline-block;width:.8rem;height:.8rem;margin-right:.3rem;border-radius:2px}
.bad{color:#a4161a}
@media print{h2{break-after:avoid}svg,tr{break-inside:avoid}}
"""
_WIDTH, _BAR, _GAP = 900, 34, 56


def parts_of(found: Foresight) -> dict[str, int]:
    """What a bar is made of: components at the peak, the allocator's rest, the context."""
    parts = dict(found.by_component)
    rest = found.reserved_bytes - sum(parts.values())
    if rest > 0:
        parts["cached, not in use"] = rest
    parts["CUDA context"] = found.context_bytes
    return {name: size for name, size in parts.items() if size > 0}


def write_report(
    configurations: Mapping[str, Foresight],
    *,
    title: str,
    measured_bytes: Mapping[str, int] | None = None,
) -> str:
    """The page as text.

    Args:
        configurations: Name -> prediction; the first one's timeline and tensors are shown.
        title: Heading: model and card.
        measured_bytes: Name -> measured reserved bytes, where known.
    """
    measured = measured_bytes or {}
    first_name, first = next(iter(configurations.items()))
    sections = [
        f"<h1>{escape(title)}</h1>",
        _verdicts(configurations, measured),
        "<h2>What fills the card</h2>",
        _legend(configurations.values()),
        _bars(configurations, measured),
    ]
    if first.timeline:
        sections += [f"<h2>Two steps of {escape(first_name)}</h2>", _timeline(first)]
    sections += [f"<h2>Alive at the peak ({escape(first.peak_phase)})</h2>", _tensors(first)]
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        + "".join(sections)
        + "</body></html>\n"
    )


def _verdicts(found: Mapping[str, Foresight], measured: Mapping[str, int]) -> str:
    rows = []
    for name, item in found.items():
        known = format_bytes(measured[name]) if name in measured else "-"
        cells = [item.allocated_bytes, item.reserved_bytes, item.context_bytes, item.total_bytes]
        numbers = "".join(f'<td class="n">{format_bytes(size)}</td>' for size in cells)
        style = ' class="bad"' if not item.fits else ""
        rows.append(
            f"<tr><td>{escape(name)}</td>{numbers}<td class='n'>{known}</td>"
            f"<td{style}>{item.verdict}</td></tr>"
        )
    heads = ("allocated", "reserved", "CUDA context", "total", "measured reserved")
    columns = "".join(f'<th class="n">{head}</th>' for head in heads)
    return f"<table><tr><th>configuration</th>{columns}<th></th></tr>{''.join(rows)}</table>"


def _legend(found: Iterable[Foresight]) -> str:
    names: dict[str, None] = {}
    for item in found:
        names |= dict.fromkeys(parts_of(item))
    return "<p>" + "".join(
        f'<span class="key"><i style="background:{_COLOURS.get(name, "#777")}"></i>'
        f"{escape(name)}</span>"
        for name in names
    ) + "</p>"  # fmt: skip


def _bars(found: Mapping[str, Foresight], measured: Mapping[str, int]) -> str:
    top = max(max(item.total_bytes, item.capacity_bytes) for item in found.values()) * 1.02
    height = _GAP * len(found) + 30
    shapes = []
    for row, (name, item) in enumerate(found.items()):
        y, x = row * _GAP + 18, 0.0
        shapes.append(f'<text x="0" y="{y - 4}" font-size="14">{escape(name)}</text>')
        for part, size in parts_of(item).items():
            width = size / top * _WIDTH
            shapes.append(
                f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_BAR}" '
                f'fill="{_COLOURS.get(part, "#777")}"><title>{escape(part)}: '
                f"{format_bytes(size)}</title></rect>"
            )
            x += width
        line = item.capacity_bytes / top * _WIDTH
        shapes.append(
            f'<line x1="{line:.1f}" x2="{line:.1f}" y1="{y - 4}" y2="{y + _BAR + 4}" '
            'stroke="#a4161a" stroke-width="3"/>'
        )
        if name in measured:
            at = (measured[name] + item.context_bytes) / top * _WIDTH
            shapes.append(f'<circle cx="{at:.1f}" cy="{y + _BAR / 2}" r="6" fill="#000"/>')
    note = "red line: what the card has for one process; black dot: measured"
    shapes.append(f'<text x="0" y="{height - 6}" font-size="13" fill="#555">{note}</text>')
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="memory by component">'
        f"{''.join(shapes)}</svg>"
    )


def _timeline(found: Foresight) -> str:
    points = _thin(found.timeline, 1500)
    top = max(reserved for _, reserved, _ in points) * 1.05
    height, left = 300, 0
    step = _WIDTH / max(1, len(points) - 1)

    def path(part: int) -> str:
        return " ".join(
            f"{left + i * step:.1f},{height - p[part] / top * height:.1f}"  # type: ignore[operator]
            for i, p in enumerate(points)
        )

    shades, start = [], 0
    tints = {
        "load": "#eef2f5",
        "forward": "#eef7ee",
        "backward": "#fdf1e7",
        "evaluation": "#f3eef8",
    }
    for i in range(1, len(points) + 1):
        if i == len(points) or points[i][2] != points[start][2]:
            name, x, width = points[start][2], start * step, (i - start) * step
            tint = tints.get(name, "#f7f7f7")
            shades.append(
                f'<rect x="{x:.1f}" y="0" width="{width:.1f}" height="{height}" fill="{tint}"/>'
            )
            if width > 60:
                shades.append(
                    f'<text x="{x + 4:.1f}" y="16" font-size="13" fill="#555">{escape(name)}</text>'
                )
            start = i
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height + 26}" role="img" aria-label="memory over time">'
        f"{''.join(shades)}"
        f'<polyline points="{path(1)}" fill="none" stroke="#777" stroke-dasharray="5 3"/>'
        f'<polyline points="{path(0)}" fill="none" stroke="#33658a" stroke-width="1.5"/>'
        f'<text x="0" y="{height + 18}" font-size="13" fill="#555">solid: allocated; dashed: '
        f"reserved; top of the picture: {format_bytes(top)}</text></svg>"
    )


def _thin(points: Sequence[tuple[int, int, str]], most: int) -> list[tuple[int, int, str]]:
    """The highest point of each stretch, so that no peak is lost."""
    stretch = max(1, -(-len(points) // most))
    return [max(points[i : i + stretch]) for i in range(0, len(points), stretch)]


def _tensors(found: Foresight) -> str:
    rows = "".join(
        f'<tr><td class="n">{tensor.count}</td><td class="n">{format_bytes(tensor.size_bytes)}</td>'
        f'<td class="n">{format_bytes(tensor.total_bytes)}</td><td>{escape(tensor.component)}</td>'
        f"<td>{escape(tensor.operator)}</td><td>{escape(tensor.where)}</td></tr>"
        for tensor in found.alive[:25]
    )
    return (
        '<table><tr><th class="n">count</th><th class="n">each</th><th class="n">together</th>'
        f"<th>component</th><th>operator</th><th>made by</th></tr>{rows}</table>"
    )
