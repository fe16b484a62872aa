"""What fits where."""

from __future__ import annotations

from tables.common import markdown, result


def fits() -> str:
    """The longest sequence per model and card; a cell leads to its run file."""
    found = result("fits")
    cards = found["cards"]
    rows = []
    for model, row in found["rows"].items():
        lengths = [row["cells"][card] for card in cards]
        linked = [
            "-" if length is None else f"[{length:,}](profiles/runs/{card}/{model}.yaml)"
            for card, length in zip(cards, lengths, strict=True)
        ]
        rows.append([row["source"].split("/")[-1], *linked])
    rows.sort(key=lambda cells: -sum(cell != "-" for cell in cells))
    head = ["model", *(f"{card.rsplit('-', 1)[1].removesuffix('gb')} GB" for card in cards)]
    names = ", ".join(f"`{card}`" for card in cards)
    libraries = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return f"{markdown(head, rows)}\n\nForeseen for {names} with {libraries}."
