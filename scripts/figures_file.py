"""A JSON file of figures that several processes may write, a part at a time.

Each part is put beside what others have put there meanwhile, under a lock that ends with its
process and leaves no file behind; a reader sees the file before or after, never half of it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def record(file: Path, name: str, figures: dict[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """Put one part into the file.

    Args:
        file: Made if need be; its folder exists.
        name: Of the part, one of `order`.
        figures: The part; one with a "skipped" reason does not replace figures.
        order: Of all parts in the file; a part not named here is dropped.

    Returns:
        What the file holds of the part now.
    """
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if "skipped" not in figures or "skipped" in held.get(name, {"skipped": ""}):
            held[name] = figures
        ordered = {part: held[part] for part in order if part in held}
        draft = file.with_name(f"{file.name}.part")
        draft.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
        draft.replace(file)
    finally:
        os.close(folder)
    return dict(held[name])
