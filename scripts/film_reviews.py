"""Accuracy on the held-out film reviews, by generation: a run's base without and with its adapter.

    .venv/bin/python scripts/film_reviews.py RUN_DIR [--rows N] [--json FILE]

Both answer the same prompts greedily, from the same NF4 base in the same process. An answer counts
as the first of the two words `positive` and `negative` in it, wherever it stands: the untuned model
likes to say "This review is positive", and demanding the bare word would make it look far worse
than it is. An answer with neither word is wrong, and its share is reported. Runs inside `.venv`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from film_data import ANSWERS, QUESTION, SYSTEM
from intervals import Interval, gain_interval, share_interval
from steps import REPOSITORY

EVAL_FILE = REPOSITORY / ".cache" / "data" / "film-reviews" / "eval.jsonl"
MAX_NEW_TOKENS = 8  # long enough for "This review is positive"
BATCH_SIZE = 50
SAMPLES = 3


@dataclass(frozen=True)
class Question:
    """One held-out row."""

    prompt: str
    truth: str

    @property
    def review(self) -> str:
        """The snippet alone."""
        return self.prompt.removeprefix(QUESTION.format(text=""))


@dataclass(frozen=True)
class Score:
    """How one model did on the held-out rows."""

    right: tuple[bool, ...]
    unparseable: int
    said_positive: int
    accuracy: Interval

    def as_json(self) -> dict[str, Any]:
        """The numbers, without the row-by-row list."""
        return {
            "rows": len(self.right),
            "right": sum(self.right),
            "accuracy": asdict(self.accuracy),
            "unparseable_share": self.unparseable / len(self.right),
            "said_positive_share": self.said_positive / len(self.right),
        }


def read_questions(path: Path = EVAL_FILE, rows: int | None = None) -> list[Question]:
    """The held-out rows; with `rows`, the first half as many of each answer, still balanced."""
    questions = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            system, user, assistant = json.loads(line)["messages"]
            assert system["content"] == SYSTEM
            questions.append(Question(user["content"], assistant["content"]))
    if rows is None:
        return questions
    kept: list[Question] = []
    for answer in ANSWERS:
        kept += [question for question in questions if question.truth == answer][: rows // 2]
    return kept


def parse_answer(text: str) -> str | None:
    """The first of the two words in an answer.

    >>> parse_answer("This review is Positive, but"), parse_answer("I liked it")
    ('positive', None)
    """
    found = re.search(r"\b(" + "|".join(ANSWERS) + r")\b", text.lower())
    return found.group(1) if found else None


def score_answers(answers: Sequence[str], questions: Sequence[Question]) -> Score:
    """Compare answers with the truth, row by row."""
    parsed = [parse_answer(answer) for answer in answers]
    right = tuple(word == question.truth for word, question in zip(parsed, questions, strict=True))
    return Score(
        right=right,
        unparseable=parsed.count(None),
        said_positive=parsed.count("positive"),
        accuracy=share_interval(sum(right), len(right)),
    )


def compare(run_folder: Path, rows: int | None = None) -> dict[str, Any]:
    """Score the base alone and with the adapter; the value is ready for JSON."""
    from qlora_trainer import generate, load_trained

    questions = read_questions(rows=rows)
    prompts = [question.prompt for question in questions]
    trained = load_trained(run_folder)
    answers: dict[str, list[str]] = {}
    scores: dict[str, Score] = {}
    report: dict[str, Any] = {}
    for name, adapter in (("before", False), ("after", True)):
        print(f"Answering {len(prompts)} held-out questions {name} training ...", flush=True)
        began = time.monotonic()
        answers[name] = generate(
            trained,
            prompts,
            adapter=adapter,
            max_new_tokens=MAX_NEW_TOKENS,
            system=SYSTEM,
            batch_size=BATCH_SIZE,
        )
        scores[name] = score_answers(answers[name], questions)
        report[name] = {**scores[name].as_json(), "seconds": time.monotonic() - began}
    gain = gain_interval(scores["before"].right, scores["after"].right)
    report["gain"] = asdict(gain)
    report["samples"] = [
        {
            "review": question.review,
            "truth": question.truth,
            "before": before,
            "after": after,
        }
        for question, before, after in zip(
            questions, answers["before"], answers["after"], strict=True
        )
    ][:SAMPLES]
    return report


def in_words(report: dict[str, Any]) -> str:
    """The report as lines for people."""
    lines = []
    for sample in report["samples"]:
        lines += [
            f"Review:  {sample['review']}   (people say: {sample['truth']})",
            f"  before: {' '.join(sample['before'].split())}",
            f"  after:  {' '.join(sample['after'].split())}",
        ]
    lines.append(
        f"\nAccuracy on {report['before']['rows']} held-out reviews, half of them positive, "
        "in % with 95 % interval:"
    )
    for name in ("before", "after"):
        side = report[name]
        lines.append(
            f"  {name + ' training':<16} {Interval(**side['accuracy']).in_points()}"
            f"   says positive {100 * side['said_positive_share']:.0f} %,"
            f" neither word {100 * side['unparseable_share']:.0f} %"
        )
    lines.append(f"  {'gain, in points':<16} {Interval(**report['gain']).in_points()}")
    return "\n".join(lines)


def main() -> int:
    """Command line: compare and print."""
    parser = argparse.ArgumentParser(description="Accuracy on held-out film reviews.")
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--rows", type=int, help="fewer held-out rows (default: all 500)")
    parser.add_argument("--json", type=Path, help="also write the report here")
    arguments = parser.parse_args()
    report = compare(arguments.run_folder, arguments.rows)
    print("\n" + in_words(report), flush=True)
    if arguments.json:
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        arguments.json.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
