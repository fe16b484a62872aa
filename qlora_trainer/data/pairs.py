"""Rows as pairs of a source and its target, whatever format they came in.

    source-target      {"source", "target"}
    translation        {"translation": {"en": ..., "de": ...}}, the languages named by
                       `columns: {source: translation.en, target: translation.de}`
    prompt-completion  {"prompt", "completion"}             the prompt is the source
    alpaca             {"instruction", "input"?, "output"}  both, a blank line between them
    messages, sharegpt a chat: its last answer is the target, all before it the source

An encoder knows no chat template, so chats are flattened: what one person said alone is just its
text; several turns are lines that begin with the role. A row that does not fit raises `RowError`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_trainer.data.faults import RowError
from qlora_trainer.data.formats import rename, to_shape
from qlora_trainer.data.messages import Chat, Prompted, check_text
from qlora_trainer.errors import UserError

PAIR_FORMATS: dict[str, tuple[str, ...]] = {
    "source-target": ("source", "target"),
    "translation": ("translation",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
}
_TARGETS = ("target", "completion", "output")
_WAY_OUT = (
    "name the columns, for example `columns: {source: article, target: summary}` or "
    "`columns: {source: translation.en, target: translation.de}`"
)


@dataclass(frozen=True)
class Pair:
    """What the encoder reads and what the decoder shall write."""

    source: str
    target: str


def recognise_pair_format(
    records: Iterable[Mapping[str, Any]], columns: Mapping[str, str], *, with_target: bool = True
) -> str:
    """Name the format of the first rows by their fields.

    Args:
        records: As they are in the source.
        columns: Our field name -> the column that holds it.
        with_target: Targets must be there.

    Raises:
        UserError: No format's fields are there.
    """
    found: dict[str, None] = {}
    for record in records:
        found.update(dict.fromkeys(rename(record, columns)))
    for name, fields in PAIR_FORMATS.items():
        needed = [field for field in fields if with_target or field not in _TARGETS]
        if all(column in found for column in needed):
            return name
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in PAIR_FORMATS.items())
    raise UserError(
        f"no source and target are recognised: the rows have {', '.join(found) or 'no fields'}; "
        f"known are {known}; {_WAY_OUT}"
    )


def to_pair(record: Mapping[str, Any], format: str, *, with_target: bool = True) -> Pair:
    """Check a record against its format and bring it to a pair.

    Args:
        record: Under our field names.
        format: A key of `PAIR_FORMATS`.
        with_target: A target must be there; without, none is looked at, and it is empty.

    Raises:
        RowError: A field is missing, of the wrong type or empty.
    """
    if not with_target:
        return Pair(to_pair(_with_filler(record, format), format).source, "")
    if format == "translation" and not {"source", "target"} & record.keys():
        languages = record.get("translation")
        have = ", ".join(languages) if isinstance(languages, Mapping) else "no object"
        raise RowError(
            f"`translation` holds {have}; which is source and which is target is not said, or "
            "not there",
            "name both: `columns: {source: translation.en, target: translation.de}`",
            "languages",
        )
    if format in ("source-target", "translation"):
        missing = [name for name in ("source", "target") if record.get(name) is None]
        if missing:
            raise RowError(
                f"missing {', '.join(f'`{name}`' for name in missing)} (the row has "
                f"{', '.join(record) or 'nothing'})",
                f"add it, drop the row, or {_WAY_OUT}",
                "missing " + ",".join(missing),
            )
        return _checked(record["source"], record["target"])
    shape = to_shape(record, format, as_chat=True)
    if isinstance(shape, Prompted):
        return _checked(shape.prompt, shape.completion)
    assert isinstance(shape, Chat)  # what else these formats become
    return _flattened(shape)


def _with_filler(record: Mapping[str, Any], format: str) -> dict[str, Any]:
    """The record with something in the target's place, so that its source alone is checked."""
    field = PAIR_FORMATS[format][-1]
    if field in _TARGETS or format == "translation":
        return {**record, "target" if format == "translation" else field: "?"}
    turns = record.get(field)
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], Mapping):
        return dict(record)
    if turns[-1].get("role", turns[-1].get("from")) in ("assistant", "gpt", "bot", "model"):
        return dict(record)
    return {**record, field: [*turns, {"role": "assistant", "content": "?"}]}


def _checked(source: Any, target: Any) -> Pair:
    pair = Pair(check_text(source, "source"), check_text(target, "target"))
    for name, text in (("source", pair.source), ("target", pair.target)):
        if not text.strip():
            raise RowError(f"`{name}` is empty", "write it or drop the row", f"empty {name}")
    return pair


def _flattened(chat: Chat) -> Pair:
    """The last answer, and the turns before it as text."""
    last = max(n for n, message in enumerate(chat.messages) if message["role"] == "assistant")
    target = chat.messages[last]["content"]
    before = chat.messages[:last]
    if not str(target).strip():
        raise RowError(
            "the last answer is a tool call, which a sequence model cannot write as text",
            "write the answer as text or drop the row",
            "tool call",
        )
    turns = [message for message in before if message["role"] != "system"]
    parts = [str(message["content"]) for message in before if message["role"] == "system"]
    if len(turns) == 1:
        parts.append(str(turns[0]["content"]))
    else:
        parts.append("\n".join(f"{message['role']}: {message['content']}" for message in turns))
    return _checked("\n\n".join(part for part in parts if part.strip()), target)
