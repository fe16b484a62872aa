"""The prediction as a picture: one self-contained HTML page, readable on a phone and in print.

Stacked bars of each configuration against the card's line, the memory timeline of one step with its
phases, the tensors at the peak, host RAM and disk, predicted beside measured. Text is HTML and only
shapes are drawn, so that nothing shrinks with the screen. No script, no network, nothing to
install.
`memory/plots.py` draws the same as PNGs.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from qlora_trainer.memory.foresight import Foresight
from qlora_trainer.memory.picture_data import (
    COLOURS,
    OTHER,
    TINTS,
    one_step,
    parts_of,
    stretches,
    thinned,
)
from qlora_trainer.memory.report_tables import Pair, disk, pairs_table, phases, tensors, verdicts
from qlora_trainer.units import format_bytes

_STYLE = """
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:62rem;padding:1rem;color:#222;
background:#fff;-webkit-print-color-adjust:exact;print-color-adjust:exact}
h1{font-size:1.5rem;line-height:1.25;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .5rem}
p{margin:.4rem 0}
table{border-collapse:collapse;width:100%;font-size:.9rem}
td,th{text-align:left;padding:.3rem .5rem;border-bottom:1px solid #ddd;vertical-align:top;
overflow-wrap:anywhere}
.n{text-align:right;white-space:nowrap}
.key{display:inline-block;margin:0 1rem .2rem 0;font-size:.85rem;white-space:nowrap}
.key i{display:inline-block;width:.8rem;height:.8rem;margin-right:.3rem;border-radius:2px;
vertical-align:-.05rem}
.name{display:flex;justify-content:space-between;gap:1rem;margin:.9rem 0 .25rem;font-size:.95rem}
.name span:first-child{overflow-wrap:anywhere}
.name span:last-child{white-space:nowrap;color:#555}
.bar{position:relative;display:flex;height:2.1rem;background:#f6f6f6}
.bar i{height:100%;flex:none}
.bar b{position:absolute;top:-.3rem;bottom:-.3rem;width:3px;background:#a4161a}
.bar u{position:absolute;top:50%;width:.8rem;height:.8rem;margin:-.4rem 0 0 -.4rem;
border-radius:50%;background:#000;border:2px solid #fff}
.time{position:relative;height:17rem;border:1px solid #ccc}
.time svg{width:100%;height:100%;display:block}
.time span{position:absolute;left:0;padding:0 .3rem;font-size:.75rem;color:#222;
background:#ffffffcc;border-top:1px solid #999;min-width:5.5rem}
.note{font-size:.85rem;color:#555}
.bad{color:#a4161a;font-weight:600}
.tight{color:#8a5a00;font-weight:600}
@media(max-width:40rem){
.wide thead{display:none}
.wide tr{display:block;border-bottom:2px solid #ddd;padding:.4rem 0}
.wide td{display:flex;justify-content:space-between;gap:1rem;border:0;padding:.1rem 0;
text-align:right;white-space:normal}
.wide td::before{content:attr(data-of);color:#555;text-align:left;flex:none}
}
@media print{body{max-width:none;font-size:11pt}h2{break-after:avoid}
tr,.row,.time{break-inside:avoid}}
"""


def write_report(
    configurations: Mapping[str, Foresight],
    *,
    title: str,
    measured_bytes: Mapping[str, int] | None = None,
    pairs: Sequence[Pair] = (),
    notes: Sequence[str] = (),
) -> str:
    """The page as text.

    Args:
        configurations: Name -> prediction; the first one's timeline and tensors are shown.
        title: Heading: model and card.
        measured_bytes: Name -> measured reserved bytes, where known.
        pairs: Predicted beside measured, where known.
        notes: What to know beside the verdicts.
    """
    measured = measured_bytes or {}
    sections = [f"<h1>{escape(title)}</h1>", *(f'<p class="note">{escape(n)}</p>' for n in notes)]
    if configurations:
        name, first = next(iter(configurations.items()))
        sections += [
            verdicts(configurations, measured),
            "<h2>What fills the card</h2>",
            _legend((part, COLOURS.get(part, OTHER)) for part in _all_parts(configurations)),
            _bars(configurations, measured),
        ]
        if first.timeline:
            sections += [f"<h2>One training step: {escape(name)}</h2>", _timeline(first)]
        sections += [
            f"<h2>Alive at the peak, in {escape(first.peak_phase)}: {escape(name)}</h2>",
            tensors(first),
            f"<h2>By phase, on the card and in host RAM: {escape(name)}</h2>",
            phases(first),
            f"<h2>On disk at most: {escape(name)}</h2>",
            disk(first),
        ]
    if pairs:
        sections += ["<h2>Predicted against measured</h2>", pairs_table(pairs)]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _all_parts(found: Mapping[str, Foresight]) -> list[str]:
    names: dict[str, None] = {}
    for item in found.values():
        names |= dict.fromkeys(parts_of(item))
    return list(names)


def _legend(colours: Iterable[tuple[str, str]]) -> str:
    keys = (
        f'<span class="key"><i style="background:{colour}"></i>{escape(name)}</span>'
        for name, colour in colours
    )
    return f"<p>{''.join(keys)}</p>"


def _bars(found: Mapping[str, Foresight], measured: Mapping[str, int]) -> str:
    top = max(max(item.total_bytes, item.capacity_bytes) for item in found.values()) * 1.02
    rows = []
    for name, item in found.items():
        shapes = [
            f'<i style="width:{size / top:.3%};background:{COLOURS.get(part, OTHER)}" '
            f'title="{escape(part)}: {format_bytes(size)}"></i>'
            for part, size in parts_of(item).items()
        ]
        shapes.append(f'<b style="left:{item.capacity_bytes / top:.3%}"></b>')
        if name in measured:
            at = (measured[name] + item.context_bytes) / top
            shapes.append(f'<u style="left:{at:.3%}"></u>')
        said = f"{format_bytes(item.total_bytes)} of {format_bytes(item.capacity_bytes)}"
        rows.append(
            f'<div class="row"><div class="name"><span>{escape(name)}</span><span>{said}</span>'
            f'</div><div class="bar" role="img" aria-label="{escape(name)}: {said}">'
            f"{''.join(shapes)}</div></div>"
        )
    note = "Red line: what the card has for the run."
    note += " Black dot: measured." if measured else ""
    return f'{"".join(rows)}<p class="note">{note}</p>'


def _timeline(found: Foresight) -> str:
    points = thinned(one_step(found), 1500)
    top = max(reserved for _, reserved, _ in points) * 1.08
    step = 1000 / max(1, len(points) - 1)

    def line(values: Iterable[int]) -> str:
        return " ".join(f"{i * step:.1f},{300 - v / top * 300:.1f}" for i, v in enumerate(values))

    phases = stretches(points)
    shades = "".join(
        f'<rect x="{start * step:.1f}" y="0" width="{(stop - start) * step:.1f}" height="300" '
        f'fill="{TINTS.get(phase, "#f2f2f2")}"><title>{escape(phase)}</title></rect>'
        for phase, start, stop in phases
    )
    ticks = "".join(
        f'<span style="top:{1 - share / 1.08:.1%}">{format_bytes(top / 1.08 * share)}</span>'
        for share in (1.0, 0.5)
    )
    used = dict.fromkeys(phase for phase, _, _ in phases)
    fixed = 'fill="none" vector-effect="non-scaling-stroke"'
    return (
        _legend((phase, TINTS.get(phase, "#f2f2f2")) for phase in used)
        + '<div class="time"><svg viewBox="0 0 1000 300" preserveAspectRatio="none" role="img" '
        f'aria-label="memory during one step">{shades}'
        f'<polyline points="{line(p[1] for p in points)}" {fixed} stroke="#777" '
        'stroke-width="1.5" stroke-dasharray="5 3"/>'
        f'<polyline points="{line(p[0] for p in points)}" {fixed} stroke="#1d4e79" '
        f'stroke-width="1.5"/></svg>{ticks}</div>'
        '<p class="note">Solid: allocated. Dashed: reserved. From left to right every allocation '
        "and release, not seconds.</p>"
    )
