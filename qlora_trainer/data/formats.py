"""Five row formats brought to three shapes: a chat, a prompt with its completion, or plain text.

    text               {"text"}                                   -> PlainText
    prompt-completion  {"prompt", "completion"} (strings)         -> Prompted
                       (lists of messages)                        -> Chat
    alpaca             {"instruction", "input"?, "output", "system"?, "history"?}
                                       -> Chat, or without a chat template the standard
                                          Alpaca prompt as Prompted
    messages           {"messages": [{"role", "content"}], "tools"?}      -> Chat
    sharegpt           {"conversations": [{"from", "value"}], "system"?, "tools"?} -> Chat

A row that does not fit raises `RowError` with the field, the rule and the way out.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from qlora_trainer.data.faults import RowError
from qlora_trainer.data.messages import (
    Chat,
    PlainText,
    Prompted,
    Shape,
    check_messages,
    check_text,
    make_chat,
)
from qlora_trainer.errors import UserError

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
OPTIONAL_FIELDS = ("input", "system", "history", "tools")

_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


def recognise_format(records: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Name the format of the first rows by their fields.

    Raises:
        UserError: No format's fields are there, or they are a preference data set's.
    """
    found: dict[str, None] = {}
    for record in records:
        found.update(dict.fromkeys(rename(record, columns)))
    if {"chosen", "rejected"} <= found.keys():
        raise UserError(
            "the rows hold `chosen` and `rejected`: a preference data set, which this product does "
            "not train on; keep the chosen answers as `prompt` and `completion`"
        )
    for name, needed in FORMATS.items():
        if all(column in found for column in needed):
            return name
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in FORMATS.items())
    have = ", ".join(found) or "no fields"
    raise UserError(
        f"the format is not recognised: the rows have {have}; known are {known}. Name the columns, "
        "for example `columns: {prompt: question, completion: answer}`"
    )


def rename(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record under our field names; a column that was named must be there.

    A dot reaches into an object, where no column has the whole name.

    >>> rename({"pair": {"en": "cat", "de": "Katze"}}, {"source": "pair.en", "target": "pair.de"})
    {'pair': {'en': 'cat', 'de': 'Katze'}, 'source': 'cat', 'target': 'Katze'}
    """
    renamed = {key: value for key, value in record.items() if key not in columns.values()}
    for ours, theirs in columns.items():
        if theirs in record:
            renamed[ours] = record[theirs]
        elif "." in theirs:
            value: Any = record
            for part in theirs.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value is not None:
                renamed[ours] = value
    return renamed


def to_shape(record: Mapping[str, Any], format: str, *, as_chat: bool) -> Shape:
    """Check a record against its format and bring it to its shape.

    Args:
        record: Under our field names.
        format: A key of `FORMATS`.
        as_chat: A chat template is there, so Alpaca rows become chats.

    Raises:
        RowError: A field is missing, of the wrong type or empty, or a role is unknown.
    """
    missing = [name for name in FORMATS[format] if record.get(name) is None]
    if missing:
        have = ", ".join(record) or "nothing"
        raise RowError(
            f"missing {', '.join(f'`{name}`' for name in missing)} ({format} format; the row has "
            f"{have})",
            "add it, drop the row, or name its column under `columns`",
            "missing " + ",".join(missing),
        )
    if format == "text":
        return PlainText(_filled(record, "text", "drop the row"))
    if format == "alpaca":
        return _alpaca(record, as_chat)
    if format == "prompt-completion":
        return _prompted(record)
    name = FORMATS[format][0]
    messages = check_messages(record[name], name)
    system = record.get("system")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": check_text(system, "system")})
    return make_chat(messages, record.get("tools"), name)


def _filled(record: Mapping[str, Any], name: str, remedy: str) -> str:
    text = check_text(record[name], name)
    if not text.strip():
        raise RowError(f"`{name}` is empty", remedy, f"empty {name}")
    return text


def _alpaca(record: Mapping[str, Any], as_chat: bool) -> Shape:
    instruction = check_text(record["instruction"], "instruction")
    extra = check_text(record.get("input") or "", "input")
    if not instruction.strip() and not extra.strip():
        raise RowError("`instruction` and `input` are empty", "drop the row", "empty instruction")
    output = _filled(record, "output", "write the answer or drop the row: it would train nothing")
    history = record.get("history") or []
    if not as_chat:
        for name in ("history", "system"):
            if record.get(name):  # the standard prompt has no place for it
                remedy = "name one under `model.chat_template`"
                raise RowError(f"`{name}` needs a chat template", remedy)
        prompt = _ALPACA_INPUT if extra.strip() else _ALPACA
        return Prompted(prompt.format_map({"instruction": instruction, "input": extra}), output)
    messages: list[dict[str, Any]] = []
    if system := record.get("system"):
        messages.append({"role": "system", "content": check_text(system, "system")})
    if not isinstance(history, list):
        raise RowError("`history` must be a list of [question, answer] pairs", "mend the row")
    for pair in history:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError("`history` must be a list of [question, answer] pairs", "mend the row")
        messages.append({"role": "user", "content": check_text(pair[0], "history")})
        messages.append({"role": "assistant", "content": check_text(pair[1], "history")})
    question = "\n\n".join(part for part in (instruction, extra) if part.strip())
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": output})
    return Chat(messages)


def _prompted(record: Mapping[str, Any]) -> Shape:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = check_messages(prompt, "prompt")
        for message in before:
            message["weight"] = 0  # the loss is on the completion alone
        return make_chat(
            before + check_messages(completion, "completion"), record.get("tools"), "completion"
        )
    answer = _filled(record, "completion", "write the answer or drop the row")
    return Prompted(check_text(prompt, "prompt"), answer)
