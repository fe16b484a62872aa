"""Exact match and F1 of answers, as SQuAD defines them.

Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text" (EMNLP 2016),
section 6.1, with the normalisation of the official `evaluate-v1.1.py`: lower case, punctuation
(ASCII) taken out, the articles a, an, the taken out, white space made single. Of several right
answers the best counts. With unanswerable questions, as in the official `evaluate-v2.0.py` (SQuAD
2.0, ACL 2018): no answer is the empty text, and is right exactly if there is none. Figures are in
per cent, as SQuAD gives them.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """What of an answer is compared.

    >>> normalize_answer("The  Eiffel-Tower, in Paris!")
    'eiffeltower in paris'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if it is one of the answers once normalized, else 0; no answers: if it is empty."""
    return max(
        float(normalize_answer(prediction) == normalize_answer(answer))
        for answer in _expected(answers)
    )


def answer_f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of the precision and recall of its words, against the nearest answer.

    >>> round(answer_f1("the Eiffel Tower in Paris", ["Eiffel Tower"]), 3)
    0.667
    """
    return max(_f1(prediction, answer) for answer in _expected(answers))


def _expected(answers: Sequence[str]) -> list[str]:
    """The answers that are something once normalized, or the empty one."""
    return [answer for answer in answers if normalize_answer(answer)] or [""]


def _f1(prediction: str, answer: str) -> float:
    ours, theirs = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


def answer_scores(
    predictions: Sequence[str], answers: Sequence[Sequence[str]]
) -> tuple[dict[str, float], dict[str, int]]:
    """Figures over all questions, in per cent, and how many questions of each kind there are.

    Args:
        predictions: One text per question; empty: no answer.
        answers: The right ones of each; none: the context holds no answer.

    Returns:
        `exact_match`, `f1`; where there are such questions `has_answer_exact_match`,
        `has_answer_f1`, `no_answer_accuracy`. Then `questions`, `has_answer`, `no_answer`.

    Raises:
        ValueError: There are none, or not as many of both.
    """
    if not predictions or len(predictions) != len(answers):
        raise ValueError("as many predictions as questions, and at least one")
    rows = [
        (exact_match(text, right), answer_f1(text, right), bool(right))
        for text, right in zip(predictions, answers, strict=True)
    ]
    answered = [row for row in rows if row[2]]
    unanswered = [row for row in rows if not row[2]]
    values = {"exact_match": _mean(rows, 0), "f1": _mean(rows, 1)}
    if answered:
        values["has_answer_exact_match"] = _mean(answered, 0)
        values["has_answer_f1"] = _mean(answered, 1)
    if unanswered:
        values["no_answer_accuracy"] = _mean(unanswered, 0)
    counts = {
        "questions": len(rows),
        "has_answer": len(answered),
        "no_answer": len(unanswered),
    }
    return values, counts


def _mean(rows: Sequence[tuple[float, float, bool]], column: int) -> float:
    return 100 * sum(row[column] for row in rows) / len(rows)
