"""`tokenizer.json`, whoever made it: read whole, or refused with all that is wrong."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_trainer.errors import UserError


def read_tokenizer(file: Path) -> dict[str, Any]:
    """`tokenizer.json` as far as it is used here, with every part of the kind it should be.

    Raises:
        UserError: It is not; the message lists all that is wrong.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--format gguf: {file}: cannot be read as JSON ({error})") from None
    faults = list(_faults(content))
    if faults:
        raise UserError.from_faults(
            f"--format gguf: {file} is not a tokenizer of the `tokenizers` library", faults
        )
    result: dict[str, Any] = content
    return result


def _faults(content: Any) -> Iterator[str]:
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        yield "`model`: there is none"
        return
    if not isinstance(model.get("type", "BPE"), str):
        yield "`type` of `model`: not a word"
    if model.get("type", "BPE") != "BPE":
        return  # not covered, whatever else it holds
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or not all(map(_is_id, vocabulary.values())):
        yield "`vocab` of `model`: not a table of tokens and their ids"
    if not isinstance(merges, list) or not all(map(_is_merge, merges)):
        yield "`merges` of `model`: not a list of pairs"
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or not all(map(_is_added, added)):
        yield "added_tokens: not a list of tokens, each with id and content"
    if not _is_splitter(content.get("pre_tokenizer")):
        yield "pre_tokenizer: not one, nor a sequence of several"


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_merge(value: Any) -> bool:
    if isinstance(value, str):
        return " " in value
    pair = isinstance(value, list) and len(value) == 2
    return pair and all(isinstance(part, str) for part in value)


def _is_added(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_id(value.get("id"))
        and isinstance(value.get("content"), str)
    )


def _is_splitter(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None
    steps = value.get("pretokenizers", [])
    if not isinstance(steps, list):
        return False
    return all(
        isinstance(step, dict) and isinstance(step.get("pattern", {}), dict)
        for step in (value, *steps)
    )
