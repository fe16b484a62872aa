"""The shapes rows are brought to, and the messages of chats checked one by one.

Roles and keys of OpenAI's and ShareGPT's kind become those chat templates take; tool calls become
`{"type": "function", "function": {"name", "arguments": object}}`, with arguments as an object
because templates write them as JSON themselves.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_trainer.data.faults import RowError, json_kind

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


def check_text(value: Any, name: str) -> str:
    """The value, if it is text a tokenizer takes.

    Raises:
        RowError: It is not.
    """
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


def check_messages(value: Any, name: str) -> list[dict[str, Any]]:
    """A list of messages under the keys and roles chat templates know.

    Raises:
        RowError: It is none, or a message lacks something.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)  # CSV and some Parquet files keep the list as JSON text
        except (ValueError, RecursionError):
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
        return check_text(content, f"{name}.content")
    parts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else json_kind(part)
            raise RowError(f"`{name}` has a part of type {kind}", "keep text parts only", "part")
        parts.append(check_text(part.get("text"), f"{name}.text"))
    return "".join(parts)


def _call(call: Any, name: str) -> dict[str, Any]:
    """One tool call as `{"type": "function", "function": {"name", "arguments": object}}`."""
    remedy = 'write {"name": ..., "arguments": {...}}'
    try:
        call = json.loads(call) if isinstance(call, str) else dict(call)
        function = dict(call.get("function") or call)
        arguments = function.get("arguments") or {}
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise RowError(f"`{name}` has a broken tool call ({error})", remedy, "tool call") from error
    if not isinstance(function.get("name"), str) or not isinstance(arguments, Mapping):
        raise RowError(f"`{name}` has a tool call without name or arguments", remedy, "tool call")
    kept = {key: call[key] for key in ("id",) if call.get(key) is not None}
    made = {"name": function["name"], "arguments": dict(arguments)}
    return {**kept, "type": "function", "function": made}


def make_chat(messages: list[dict[str, Any]], tools: Any, name: str) -> Chat:
    """A chat with something to train in it.

    Raises:
        RowError: It has no assistant turn, or broken tools.
    """
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
        except (ValueError, RecursionError) as error:
            raise RowError(f"`tools` is broken JSON: {error}", "mend it", "tools") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("`tools` is not a list of objects", "write JSON function schemas", "tools")
    return [
        dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}
        for tool in tools
    ]
