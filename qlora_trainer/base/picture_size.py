"""How large a model's image processor makes its pictures, from the file it is kept in."""

import json
from pathlib import Path
from typing import Any

PROCESSOR_FILE = "preprocessor_config.json"


def processed_size(folder: Path) -> tuple[int, int] | None:
    """Height and width of every picture after the processor of a model folder.

    A processor that keeps the sides' ratio and does not crop makes pictures of many sizes; squares
    of its shortest edge stand for them.

    Args:
        folder: Of the model.

    Returns:
        Pixels; None where there is no processor, or its file does not say.
    """
    try:
        said = json.loads((folder / PROCESSOR_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # who opens the processor itself says what is wrong with it
        return None
    if not isinstance(said, dict):
        return None
    cropped = said.get("crop_size") if said.get("do_center_crop", True) else None
    return _pixels(cropped) or _pixels(said.get("size"))


def _pixels(size: Any) -> tuple[int, int] | None:
    if isinstance(size, dict):
        edge = size.get("shortest_edge")
        size = [size.get("height", edge), size.get("width", edge)]
    sides = [size, size] if isinstance(size, int) else size
    match sides:
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
    return None
