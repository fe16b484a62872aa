"""Where a run's answers end."""

import json
from pathlib import Path
from typing import Any


def learned_stop_ids(folder: Path, tokenizer: Any) -> list[int]:
    """The special token that a run's answers ended with, where they ended with one.

    A base that was taught to chat ends its turns with it, whatever its tokenizer's EOS is.

    Args:
        folder: The run folder, whose `data.json` tells.
        tokenizer: Of the run; None where its task has none.
    """
    file = folder / "data.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    added = () if tokenizer is None else tokenizer.added_tokens_decoder.items()
    return [i for i, token in added if token.special and token.content == told.get("end_of_turn")]
