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

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_trainer.data.faults import RowError, json_kind
from qlora_trainer.errors import UserError

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
OPTIONAL_FIELDS = ("input", "system", "history", "tools")

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_call": "function_call",
}
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class PlainText:
    """A document; every token is trained."""

    text: str


@dataclass(frozen=True)
class Prompted:
    """A completion to be trained and the raw text before it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """Messages in the form chat templates take, and the tools offered in them."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


Shape = PlainText | Prompted | Chat


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
    """The record under our field names; a column that was named must be there."""
    renamed = {key: value for key, value in record.items() if key not in columns.values()}
    for ours, theirs in columns.items():
        if theirs in record:
            renamed[ours] = record[theirs]
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
    messages = _messages(record[name], name)
    system = record.get("system")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(system, "system")})
    return _chat(messages, record.get("tools"), name)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(
            f"`{name}` is {json_kind(value)}, not text", "write it as a string", "wrong type"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"`{name}` holds half a character (a lone surrogate, U+{ord(value[error.start]):04X})",
            "remove it; text cut in the middle of an emoji is the usual cause",
            "lone surrogate",
        ) from error
    return value


def _filled(record: Mapping[str, Any], name: str, remedy: str) -> str:
    text = _text(record[name], name)
    if not text.strip():
        raise RowError(f"`{name}` is empty", remedy, f"empty {name}")
    return text


def _alpaca(record: Mapping[str, Any], as_chat: bool) -> Shape:
    instruction = _text(record["instruction"], "instruction")
    extra = _text(record.get("input") or "", "input")
    if not instruction.strip() and not extra.strip():
        raise RowError("`instruction` and `input` are empty", "drop the row", "empty instruction")
    output = _filled(record, "output", "write the answer or drop the row: it would train nothing")
    history = record.get("history") or []
    if not as_chat:
        if history:
            raise RowError("`history` needs a chat template", "name one under `chat_template`")
        prompt = _ALPACA_INPUT if extra.strip() else _ALPACA
        return Prompted(prompt.format_map({"instruction": instruction, "input": extra}), output)
    messages: list[dict[str, Any]] = []
    if system := record.get("system"):
        messages.append({"role": "system", "content": _text(system, "system")})
    for pair in history:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError("`history` must be a list of [question, answer] pairs", "mend the row")
        messages.append({"role": "user", "content": _text(pair[0], "history")})
        messages.append({"role": "assistant", "content": _text(pair[1], "history")})
    question = "\n\n".join(part for part in (instruction, extra) if part.strip())
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": output})
    return Chat(messages)


def _prompted(record: Mapping[str, Any]) -> Shape:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(prompt, "prompt")
        for message in before:
            message["weight"] = 0  # the loss is on the completion alone
        return _chat(
            before + _messages(completion, "completion"), record.get("tools"), "completion"
        )
    answer = _filled(record, "completion", "write the answer or drop the row")
    return Prompted(_text(prompt, "prompt"), answer)


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)  # CSV and some Parquet files keep the list as JSON text
        except json.JSONDecodeError:
            value = str(value)
    if not isinstance(value, list):
        problem = f"`{name}` is {json_kind(value)}, not a list of messages"
        raise RowError(problem, "mend the row", "wrong type")
    if not value:
        raise RowError(f"`{name}` is an empty list", "drop the row", "empty list")
    return [_message(item, f"{name}[{index}]") for index, item in enumerate(value)]


def _message(item: Any, name: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        problem = f"`{name}` is {json_kind(item)}, not an object"
        raise RowError(problem, "mend the row", "wrong type")
    role = item.get("role", item.get("from"))
    if role is None:
        raise RowError(f"`{name}` has no `role`", "add it (`from` in ShareGPT)", "no role")
    known = _ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        raise RowError(
            f"`{name}` has the unknown role {role!r}",
            f"use one of {', '.join(sorted(_ROLES))}",
            "unknown role",
        )
    content = item.get("content", item.get("value"))
    calls = item.get("tool_calls")
    if content is None and not calls:
        raise RowError(f"`{name}` has no `content`", "add it (`value` in ShareGPT)", "no content")
    text = _content(content, name)
    if known == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [_call(text, name)]}
    message = {k: v for k, v in item.items() if k not in ("from", "value") and v is not None}
    message |= {"role": known, "content": text}
    if calls:
        if not isinstance(calls, list):
            raise RowError(f"`{name}.tool_calls` is not a list", "mend the row", "wrong type")
        message["tool_calls"] = [_call(call, name) for call in calls]
    elif known == "assistant" and not text.strip():
        raise RowError(
            f"empty answer: `{name}` (assistant) has no text",
            "write the answer or drop the row",
            "empty answer",
        )
    return message


def _content(content: Any, name: str) -> str:
    if content is None:
        return ""
    if not isinstance(content, list):
        return _text(content, f"{name}.content")
    parts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else json_kind(part)
            raise RowError(f"`{name}` has a part of type {kind}", "keep text parts only", "part")
        parts.append(_text(part.get("text"), f"{name}.text"))
    return "".join(parts)


def _call(call: Any, name: str) -> dict[str, Any]:
    """One tool call as `{"type": "function", "function": {"name", "arguments": object}}`."""
    remedy = 'write {"name": ..., "arguments": {...}}'
    try:
        call = json.loads(call) if isinstance(call, str) else dict(call)
        function = dict(call.get("function") or call)
        arguments = function.get("arguments") or {}
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (json.JSONDecodeError, TypeError, ValueError, AttributeError) as error:
        raise RowError(f"`{name}` has a broken tool call ({error})", remedy, "tool call") from error
    if not isinstance(function.get("name"), str) or not isinstance(arguments, Mapping):
        raise RowError(f"`{name}` has a tool call without name or arguments", remedy, "tool call")
    kept = {key: call[key] for key in ("id",) if call.get(key) is not None}
    made = {"name": function["name"], "arguments": dict(arguments)}
    return {**kept, "type": "function", "function": made}


def _chat(messages: list[dict[str, Any]], tools: Any, name: str) -> Chat:
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError(
            f"`{name}` has no assistant turn: nothing would be trained",
            "add the answer or drop the row",
            "no assistant",
        )
    return Chat(messages, _tools(tools))


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tools as a list of function schemas; `""`, `[]` and null mean none."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise RowError(f"`tools` is broken JSON: {error}", "mend it", "tools") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("`tools` is not a list of objects", "write JSON function schemas", "tools")
    return [
        dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}
        for tool in tools
    ]
