"""SQuAD's nested JSON file as flat rows: one question with its context and answers each.

    {"version": ..., "data": [{"title": ..., "paragraphs": [{"context": ..., "qas": [
        {"id": ..., "question": ..., "answers": [{"text": ..., "answer_start": ...}]}]}]}]}

Such a file is one value and the published ones are tens of megabytes, so it is read whole.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_trainer.data.faults import Fault, FaultLog, json_kind
from qlora_trainer.data.text_lines import Row, not_utf8, open_binary

_BEGINS = re.compile(
    rb'\{\s*("version"\s*:\s*"[^"]*"\s*,\s*)?"data"\s*:\s*\[\s*\{\s*"(title|paragraphs)"\s*:'
)
_SHAPE = (
    'SQuAD files are {"data": [{"paragraphs": [{"context", "qas": [{"question", "answers"}]}]}]}'
)


def is_squad(head: bytes) -> bool:
    """Whether a file that begins so is SQuAD's."""
    return _BEGINS.match(head) is not None


def read_squad(path: Path, faults: FaultLog) -> Iterator[Row]:
    """One row per question, with `id`, `title`, `question`, `context`, `answers` ..."""
    with open_binary(path) as handle:
        content = handle.read()
    try:
        articles = json.loads(content.decode("utf-8-sig"))["data"]
    except UnicodeDecodeError as error:
        faults.add(not_utf8(path, content.count(b"\n", 0, error.start) + 1, error))
        return
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}"
        problem = f"broken JSON: {error.msg} at column {error.colno}"
        faults.add(Fault(where, problem, "write or download the file again", "broken JSON"))
        return
    except (ValueError, RecursionError) as error:
        problem = f"JSON that cannot be read ({str(error).partition(';')[0]})"
        faults.add(Fault(f"{path}", problem, "write or download the file again", "broken JSON"))
        return
    for number, article in _objects(articles, f"{path}", "data", "article", faults):
        place = f"{path} article {number}"
        paragraphs = article.get("paragraphs")
        for index, paragraph in _objects(paragraphs, place, "paragraphs", "paragraph", faults):
            inner = f"{place} paragraph {index}"
            for order, asked in _objects(paragraph.get("qas"), inner, "qas", "question", faults):
                shared = {"title": article.get("title"), "context": paragraph.get("context")}
                record = {**{k: v for k, v in shared.items() if v is not None}, **asked}
                name = f" (id {asked['id']})" if "id" in asked else ""
                yield Row(record, f"{inner} question {order}{name}")


def _objects(
    items: Any, where: str, field: str, what: str, faults: FaultLog
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a list with their numbers; what is none becomes a fault."""
    if not isinstance(items, list):
        faults.add(Fault(where, f"`{field}` is {json_kind(items)}, not a list", _SHAPE, field))
        return
    for number, item in enumerate(items, 1):
        if isinstance(item, dict):
            yield number, item
        else:
            problem = f"{what} {number} is {json_kind(item)}, not an object"
            faults.add(Fault(where, problem, _SHAPE, what))
