"""The table of every setting, from its declaration."""

from __future__ import annotations

from qlora_trainer.config.document import settings_table


def settings() -> str:
    """Every setting of the run file."""
    rows = [[f"`{name}`", f"`{default}`", text] for name, default, text in settings_table()]
    lines = [["setting", "default", "what it does"], ["---"] * 3, *rows]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"<details><summary>All {len(rows)} settings</summary>\n\n{table}\n\n</details>"
