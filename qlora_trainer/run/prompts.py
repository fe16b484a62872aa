"""Questions of a file, in a template, after a few examples: what a model is asked without training.

A template is text with `{prompt}` in it, put around what is asked. Examples stand before it: of a
chat as turns of their own, of raw text as text with an empty line between.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_trainer.config.settings import SourceSettings
from qlora_trainer.data.encode import Encoder
from qlora_trainer.data.faults import FaultLog, RowError
from qlora_trainer.data.formats import recognise_format, rename, to_shape
from qlora_trainer.data.messages import Chat, Prompted
from qlora_trainer.data.read import DataSource, open_source
from qlora_trainer.errors import UserError

_PLACE = "{prompt}"


@dataclass(frozen=True)
class Question:
    """What is asked, and what should be answered.

    Attributes:
        asked: The messages of a chat up to the answer, or raw text.
        answer: As the file says it.
    """

    asked: list[dict[str, Any]] | str
    answer: str


def read_template(given: str | None) -> str | None:
    """A template as text, or from the file of this name.

    Raises:
        UserError: It has no place for what is asked.
    """
    if given is None:
        return None
    try:
        text = Path(given).read_text(encoding="utf-8") if Path(given).is_file() else given
    except OSError:
        text = given  # too long for a name: text
    if text.count(_PLACE) != 1:
        raise UserError(f"--prompt-template: must hold {_PLACE} once: {text[:80]!r}")
    return text


def read_questions(source: SourceSettings, encoder: Encoder, limit: int | None) -> list[Question]:
    """The rows of a file that have an answer, each with it apart.

    Args:
        source: The file, its format and its columns.
        encoder: Tells whether rows become chats.
        limit: Only so many, from the beginning.

    Raises:
        UserError: With every faulty row, its file and line.
    """
    faults = FaultLog()
    opened = open_source(DataSource(**source.model_dump()))
    rows = list(itertools.islice(opened.rows(faults), limit))
    faults.raise_if_any(f"{source.path} cannot be read")
    if not rows:
        raise UserError(f"{source.path}: holds no rows")
    form: str = source.format
    if form == "auto":
        form = recognise_format((row.record for row in rows), source.columns)
    questions = []
    for row in rows:
        try:
            questions.append(_question(rename(row.record, source.columns), form, encoder))
        except RowError as error:
            faults.add(error.at(row.where))
    faults.raise_if_any(f"{source.path} cannot be asked")
    return questions


def _question(record: Mapping[str, Any], form: str, encoder: Encoder) -> Question:
    shape = to_shape(record, form, as_chat=encoder.as_chat)
    if isinstance(shape, Prompted):
        return Question(shape.prompt, shape.completion.strip())
    if isinstance(shape, Chat) and shape.messages[-1]["role"] == "assistant":
        answer = shape.messages[-1].get("content")
        if isinstance(answer, str) and len(shape.messages) > 1:
            return Question(shape.messages[:-1], answer.strip())
    raise RowError("asks nothing that is answered", "take rows with a question and an answer")


def ask_with(
    question: Question, template: str | None = None, examples: Sequence[Question] = ()
) -> list[dict[str, Any]] | str:
    r"""What a model is asked: the examples, then the question in its template.

    >>> ask_with(Question("2 + 2", "4"), "Sum: {prompt} =", [Question("1 + 1", "2")])
    'Sum: 1 + 1 = 2\n\nSum: 2 + 2 ='
    """
    if isinstance(question.asked, str):
        shown = [f"{_fill(template, str(e.asked))} {e.answer}" for e in examples]
        return "\n\n".join([*shown, _fill(template, question.asked)])
    system = [turn for turn in question.asked if turn["role"] == "system"]
    turns: list[dict[str, Any]] = []
    for example in examples:
        turns += _filled_turns(example, template)
        turns.append({"role": "assistant", "content": example.answer})
    return [*system, *turns, *_filled_turns(question, template)]


def _filled_turns(question: Question, template: str | None) -> list[dict[str, Any]]:
    asked = question.asked
    turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    turns = [dict(turn) for turn in turns if turn["role"] != "system"]
    turns[-1]["content"] = _fill(template, str(turns[-1]["content"]))
    return turns


def _fill(template: str | None, text: str) -> str:
    return text if template is None else template.replace(_PLACE, text)
