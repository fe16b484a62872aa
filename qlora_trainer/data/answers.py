"""Rows as questions on a context, with the places of their answers in it.

    SQuAD   {"question", "context", "answers": {"text": [...], "answer_start": [...]}}
            or {"answers": [{"text", "answer_start"}, ...]}
    flat    {"question", "context", "answer", "answer_start"}

No answer (`answers` empty, `answer` empty or null, or `is_impossible`) means that the context does
not hold one. `answer_start` counts characters from 0. A text that does not stand where it is said
to is refused, with the places where it does stand: a shifted answer would teach wrong words.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora_trainer.data.faults import RowError, json_kind
from qlora_trainer.data.formats import rename
from qlora_trainer.data.messages import check_text
from qlora_trainer.errors import UserError

FORMAT = "question-context"
_WAY_OUT = "name the columns, for example `columns: {context: passage, answer: span}`"
_WHOLE = re.compile(r"-?\d{1,18}")
_EMPTY: tuple[Any, ...] = (None, "", [], {})

Spans = list[tuple[int, int]]  # characters of each token


@dataclass(frozen=True)
class Asked:
    """A question on a context.

    Attributes:
        question: Text.
        context: Text.
        answers: Texts of the right answers; none where the context holds no answer.
        starts: Where each begins, in characters.
        id: What the row calls itself.
    """

    question: str
    context: str
    answers: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()
    id: str | None = None


def recognise_questions(
    records: Iterable[Mapping[str, Any]], columns: Mapping[str, str], *, labelled: bool = True
) -> str:
    """The name of the only format, if its fields are there.

    Raises:
        UserError: They are not.
    """
    found: dict[str, None] = {}
    for record in records:
        found.update(dict.fromkeys(rename(record, columns)))
    answered = {"answers", "answer", "is_impossible"} & found.keys()
    if {"question", "context"} <= found.keys() and (answered or not labelled):
        return FORMAT
    needed = "`question`, `context`" + (" and `answers` or `answer`" if labelled else "")
    have = ", ".join(found) or "no fields"
    raise UserError(f"no {needed} in the rows, which have {have}; {_WAY_OUT}")


def to_asked(record: Mapping[str, Any], *, labelled: bool = True) -> Asked:
    """Check a record.

    Args:
        record: Under our field names.
        labelled: Answers must be there; without, none are looked at.

    Raises:
        RowError: A field is missing, empty or of the wrong type, or an answer is not in its place.
    """
    name = record.get("id")
    asked = Asked(
        _text(record, "question"), _text(record, "context"), id=None if name is None else str(name)
    )
    if not labelled:
        return asked
    answers = _answers(record)
    impossible = _is_impossible(record)
    if impossible and answers:
        raise RowError(
            f"`is_impossible` is true, yet there is the answer {answers[0][0]!r}",
            "take one of both away",
            "impossible but answered",
        )
    if impossible is False and not answers:
        raise RowError(
            "`is_impossible` is false, yet there is no answer",
            "give the answer, or set is_impossible to true",
            "possible but unanswered",
        )
    for text, start in answers:
        _check_place(asked.context, text, start)
    pairs = dict.fromkeys(answers)  # several people often gave the same answer
    return replace(
        asked,
        answers=tuple(text for text, _ in pairs),
        starts=tuple(start for _, start in pairs),
    )


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        raise RowError(
            f"missing `{name}` (the row has {', '.join(record) or 'nothing'})",
            f"add it, drop the row, or {_WAY_OUT}",
            f"missing {name}",
        )
    if not isinstance(value, str):
        problem = f"`{name}` is {json_kind(value)}, not a string"
        raise RowError(problem, "write it as text", f"{name} kind")
    check_text(value, name)
    if not value.strip():
        raise RowError(f"`{name}` is empty", "write it or drop the row", f"empty {name}")
    return value


def _is_impossible(record: Mapping[str, Any]) -> bool | None:
    value = record.get("is_impossible")
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):  # a CSV cell
        return value.strip().lower() == "true"
    if value is None or value == "" or isinstance(value, bool):
        return value if isinstance(value, bool) else None
    problem = f"`is_impossible` is {json_kind(value)}, not true or false"
    raise RowError(problem, "write true or false", "is_impossible kind")


def _answers(record: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Texts and places, as they are said."""
    given = record.get("answers")
    if given in _EMPTY and record.get("answer") not in _EMPTY:
        given = {"text": [record["answer"]], "answer_start": [record.get("answer_start")]}
    if given in _EMPTY:
        if {"answers", "answer", "is_impossible"} & record.keys():
            return []
        raise RowError(
            f"neither `answers` nor `answer` (the row has {', '.join(record)})",
            "add it (an empty list where the context holds no answer), or " + _WAY_OUT,
            "missing answers",
        )
    if isinstance(given, list):
        if not all(isinstance(item, Mapping) for item in given):
            raise _shape(given)
        given = {key: [item.get(key) for item in given] for key in ("text", "answer_start")}
    if not isinstance(given, Mapping) or not isinstance(given.get("text", []), list):
        raise _shape(given)
    texts, starts = given.get("text", []), given.get("answer_start", [])
    if not isinstance(starts, list) or len(texts) != len(starts):
        count = len(starts) if isinstance(starts, list) else "no list of"
        raise RowError(
            f"{len(texts)} answer texts but {count} `answer_start`",
            "say for every answer where it begins in the context",
            "answers and starts",
        )
    return [(_answer_text(text), _start(start)) for text, start in zip(texts, starts, strict=True)]


def _shape(given: Any) -> RowError:
    return RowError(
        f"`answers` is {json_kind(given)} of another shape",
        'write {"text": ["Paris"], "answer_start": [17]}, or flat `answer` and `answer_start`',
        "answers shape",
    )


def _answer_text(text: Any) -> str:
    if not isinstance(text, str):
        problem = f"an answer is {json_kind(text)}, not a string"
        raise RowError(problem, "write its text as it stands in the context", "answer kind")
    check_text(text, "answers")
    if not text.strip():
        remedy = "where the context holds no answer, leave the list of answers empty"
        raise RowError("an answer is empty", remedy, "empty answer")
    return text


def _start(start: Any) -> int:
    if isinstance(start, str) and _WHOLE.fullmatch(start.strip()):  # a CSV cell
        return int(start)
    if isinstance(start, float) and start.is_integer():  # a column with gaps
        return int(start)
    if isinstance(start, int) and not isinstance(start, bool):
        return start
    said = "is missing" if start in (None, "") else f"is {start!r}, not a whole number"
    raise RowError(
        f"`answer_start` {said}",
        "say at which character of the context the answer begins, counted from 0",
        "answer_start",
    )


def _check_place(context: str, text: str, start: int) -> None:
    if start >= 0 and context.startswith(text, start):
        return
    places, at = list[int](), context.find(text)
    while at >= 0 and len(places) < 3:
        places.append(at)
        at = context.find(text, at + 1)
    stands = "beyond its end" if start >= len(context) else "before its beginning"
    if 0 <= start < len(context):
        stands = f"{context[start : start + len(text)]!r}"
    if places:
        remedy = f"it stands at {', '.join(map(str, places))}: mend `answer_start`"
        if len(context.encode()) > len(context):
            remedy += " (characters are counted, not bytes)"
    else:
        remedy = "it stands nowhere in the context: mend the answer, or leave the answers empty"
    raise RowError(
        f"the answer {text!r} does not stand at character {start} of the context, where there is "
        f"{stands}",
        remedy,
        "answer not at its start",
    )


def held_answer(asked: Asked, spans: Spans) -> tuple[int, int] | None:
    """First and last token of the first answer that these tokens of the context hold whole."""
    for text, start in zip(asked.answers, asked.starts, strict=True):
        start += len(text) - len(text.lstrip())  # tokens do not hold the spaces at its ends
        end = start + len(text.strip())
        inside = [n for n, (a, b) in enumerate(spans) if a < end and b > start and a < b]
        if inside and spans[inside[0]][0] <= start and spans[inside[-1]][1] >= end:
            return inside[0], inside[-1]
    return None
