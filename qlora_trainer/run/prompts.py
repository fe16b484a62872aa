"""Questions of a file, in a template, after a few examples: what a model is asked without training.

A template is text with `{prompt}` in it, put around what is asked. Examples stand before it: of a
chat as turns of their own, of raw text as text with an empty line between.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_trainer.config.settings import SourceSettings
from qlora_trainer.data.encode import Encoder
from qlora_trainer.data.faults import FaultLog, RowError
from qlora_trainer.data.formats import recognise_format, rename, to_shape
from qlora_trainer.data.messages import Chat, PlainText, Prompted, check_messages
from qlora_trainer.data.read import DataSource, open_source
from qlora_trainer.errors import UserError
from qlora_trainer.run.ask import Prompt, Trained

_PLACE = "{prompt}"
_STAND_IN = "-"  # for an answer that is not there: rows are checked as those trained on


@dataclass(frozen=True)
class Question:
    """What is asked, and what should be answered.

    Attributes:
        asked: The messages of a chat up to the answer, or raw text.
        answer: As the file says it.
        where: File and line.
    """

    asked: list[dict[str, Any]] | str
    answer: str
    where: str = ""


def source_like(trained: Trained, path: str) -> SourceSettings:
    """A file read as the training data was: its format, its columns."""
    first = trained.run.data.train[0]
    return SourceSettings(path=path, format=first.format, columns=first.columns)


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


def read_questions(
    source: SourceSettings, encoder: Encoder, limit: int | None = None, *, answered: bool = True
) -> list[Question]:
    """The rows of a file, each with its answer apart.

    Args:
        source: The file, its format and its columns.
        encoder: Tells whether rows become chats.
        limit: Only so many, from the beginning.
        answered: False takes rows without an answer too, and asks for what follows a text.

    Raises:
        UserError: With every faulty row, its file and line.
    """
    faults = FaultLog()
    opened = open_source(DataSource(**source.model_dump()))
    rows = list(itertools.islice(opened.rows(faults), limit))
    faults.raise_if_any(f"{source.path} cannot be read")
    if not rows:
        raise UserError(f"{source.path}: holds no rows")
    records = [rename(row.record, source.columns) for row in rows]
    if not answered:
        records = [_with_some_answer(record) for record in records]
    form: str = source.format
    if form == "auto":
        form = recognise_format(records, {})
    questions = []
    for row, record in zip(rows, records, strict=True):
        try:
            found = _question(record, form, encoder, answered)
            questions.append(replace(found, where=row.where))
        except RowError as error:
            faults.add(error.at(row.where))
    faults.raise_if_any(f"{source.path} cannot be asked")
    return questions


def _with_some_answer(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a stand-in where a row to be trained on would have its answer."""
    record = dict(record)
    turn = {"role": "assistant", "content": _STAND_IN}
    for name in ("messages", "conversations"):
        turns = record.get(name)
        if isinstance(turns, list) and turns and not _is_answer(turns[-1]):
            record[name] = [*turns, turn]
    for asked, answer in (("prompt", "completion"), ("instruction", "output")):
        if record.get(asked) is not None and record.get(answer) is None:
            record[answer] = [turn] if isinstance(record[asked], list) else _STAND_IN
    return record


def _is_answer(turn: Any) -> bool:
    try:
        return check_messages([turn], "messages")[0]["role"] == "assistant"
    except RowError:
        return True  # told with its place when the row is brought to its shape


def _question(record: Mapping[str, Any], form: str, encoder: Encoder, answered: bool) -> Question:
    shape = to_shape(record, form, as_chat=encoder.as_chat)
    if isinstance(shape, Prompted):
        return Question(shape.prompt, shape.completion.strip())
    if isinstance(shape, PlainText) and not answered:
        return Question(as_asked(shape.text, encoder), "")
    if isinstance(shape, Chat) and shape.messages[-1]["role"] == "assistant":
        answer = shape.messages[-1].get("content")
        if isinstance(answer, str) and len(shape.messages) > 1:
            return Question(shape.messages[:-1], answer.strip())
    raise RowError("asks nothing that is answered", "take rows with a question and an answer")


def as_asked(text: str, encoder: Encoder) -> list[dict[str, Any]] | str:
    """A text as a turn of the user where the model was trained on chats, else as it is."""
    return [{"role": "user", "content": text}] if encoder.as_chat else text


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


def in_prompts(
    trained: Trained,
    questions: Sequence[Question],
    prompt_template: str | None = None,
    examples: str | None = None,
) -> list[Prompt]:
    """What a causal model is asked: examples of a file, then each question in its template.

    Args:
        trained: A causal model.
        questions: From `read_questions`, or made.
        prompt_template: Text or file with `{prompt}`.
        examples: A file of questions and answers in the format of the training data.

    Raises:
        UserError: The template has no place for a question, or an example has no answer.
    """
    template, shown = read_template(prompt_template), list[Question]()
    if examples is not None and isinstance(trained.encoder, Encoder):
        shown = read_questions(source_like(trained, examples), trained.encoder)
    return [ask_with(question, template, shown) for question in questions]


def prompts_of(
    trained: Trained,
    texts: Sequence[str],
    prompt_template: str | None = None,
    examples: str | None = None,
) -> Sequence[Prompt]:
    """Texts to ask a causal model, in a template and after examples where there are any."""
    encoder = trained.encoder
    if not isinstance(encoder, Encoder) or (prompt_template is None and examples is None):
        return texts
    questions = [Question(as_asked(text, encoder), "") for text in texts]
    return in_prompts(trained, questions, prompt_template, examples)
