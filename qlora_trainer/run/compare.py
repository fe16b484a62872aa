"""Zero-shot, few-shot and tuned answers to the same questions, in one table.

`zero-shot` asks the base in a template, `few-shot` the base after a few examples, `tuned` the
adapter as it was trained: without either. Answers are greedy and scored as SQuAD scores its own:
exact match and F1 over words, both after normalisation.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.base.files import write_text_atomically
from qlora_trainer.data.encode import Encoder
from qlora_trainer.errors import UserError
from qlora_trainer.run.ask import answer_encoded, encode_prompts, load_trained
from qlora_trainer.run.prompts import Question, ask_with, read_questions, read_template, source_like
from qlora_trainer.run.report import Reporter
from qlora_trainer.tasks.answer_metrics import answer_f1, exact_match
from qlora_trainer.training.folder import EVALUATION

WAYS = ("zero-shot", "few-shot", "tuned")


@dataclass(frozen=True)
class Compared:
    """Figures of each way of asking.

    Attributes:
        table: Way -> `exact_match`, `f1` (between 0 and 1) and `rows`.
        folder: Where figures and answers were written.
    """

    table: dict[str, dict[str, float]]
    folder: Path


def compare_ways(
    folder: str | Path,
    data: str,
    ways: Sequence[str],
    *,
    prompt_template: str | None = None,
    examples: str | None = None,
    rows: int | None = None,
    max_new_tokens: int = 64,
    out: str | Path | None = None,
    reporter: Reporter | None = None,
) -> Compared:
    """Ask the questions of a file in several ways and score the answers.

    Args:
        folder: A finished run of a causal model.
        data: Questions and answers in the format of the training data.
        ways: Of `WAYS`.
        prompt_template: Text or file with `{prompt}`, for the ways without training.
        examples: Questions and answers that few-shot shows; a file in the same format.
        rows: Only so many questions.
        max_new_tokens: Longest answer.
        out: Where to write; `evaluation` in the run folder unless given.
        reporter: Told what happens.

    Raises:
        UserError: A way is unknown, few-shot has no examples or more than the model can read, or
            the run is of another task.
    """
    unknown = [way for way in ways if way not in WAYS]
    if unknown or not ways:
        raise UserError(f"--compare {','.join(ways)}: name some of {', '.join(WAYS)}")
    if ("few-shot" in ways) != (examples is not None):
        raise UserError("--examples FILE: few-shot needs it, and only few-shot takes it")
    template = read_template(prompt_template)
    told = reporter or Reporter()
    trained = load_trained(folder, reporter=told)
    encoder = trained.encoder
    if not isinstance(encoder, Encoder):
        raise UserError(f"{folder}: its task is {trained.run.task}; only causal-lm is prompted")
    questions = read_questions(source_like(trained, data), encoder, rows)
    shown: list[Question] = []
    if examples is not None:
        shown = read_questions(source_like(trained, examples), encoder, None)
    prompts: dict[str, list[list[int]]] = {}
    for way in ways:  # all of them before the first answer
        asked = [
            ask_with(q, None if way == "tuned" else template, shown if way == "few-shot" else ())
            for q in questions
        ]
        prompts[way] = encode_prompts(trained, asked, raw=True)
    table: dict[str, dict[str, float]] = {}
    answers: dict[str, list[str]] = {}
    for way, encoded in prompts.items():
        told.say(f"{way}: asking {len(encoded)} questions")
        answers[way] = answer_encoded(
            trained, encoded, adapter=way == "tuned", max_new_tokens=max_new_tokens
        )
        table[way] = _figures(answers[way], questions)
    target = Path(out) if out is not None else Path(folder) / EVALUATION
    _write(target, table, answers, questions)
    return Compared(table, target)


def _figures(answers: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    pairs = list(zip(answers, (q.answer for q in questions), strict=True))
    return {
        "exact_match": sum(exact_match(said, [right]) for said, right in pairs) / len(pairs),
        "f1": sum(answer_f1(said, [right]) for said, right in pairs) / len(pairs),
        "rows": float(len(pairs)),
    }


def _write(
    folder: Path,
    table: dict[str, dict[str, float]],
    answers: dict[str, list[str]],
    questions: Sequence[Question],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / "compare.json", json.dumps(table, indent=2) + "\n")
    lines = []
    for index, question in enumerate(questions):
        said = {way: given[index] for way, given in answers.items()}
        record = {"asked": question.asked, "answer": question.answer, **said}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_text_atomically(folder / "compare.jsonl", "".join(lines))
