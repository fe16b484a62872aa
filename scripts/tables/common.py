"""What the README's tables share: where benchmarks write, and how rows become markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"


def result(name: str) -> dict[str, Any]:
    """What a benchmark wrote."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def recorded(name: str) -> dict[str, Any] | None:
    """What a benchmark wrote; None where it has not run."""
    return result(name) if (RESULTS / f"{name}.json").is_file() else None


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table; every column but the first is right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
