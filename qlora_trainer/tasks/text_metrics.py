"""How near generated texts are to what was expected: BLEU, chrF, ROUGE, exact matches.

BLEU (Papineni et al., ACL 2002) and chrF (Popović, WMT 2015) come from `sacrebleu`, whose signature
(tokenizer, smoothing, version) is kept beside the figures: without it a BLEU cannot be compared
(Post, WMT 2018). ROUGE (Lin, 2004) is our own, since `rouge-score` is unmaintained and brings NLTK
for a stemmer: F1 of n-grams and of the longest common subsequence over lower-cased runs of letters
and digits, no stemming, averaged over rows. For ASCII texts it is what `rouge-score` gives (its
tokenizer throws away every letter outside a-z; ours keeps them, or German would lose its umlauts).
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

TEXT_METRICS = ("bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match")
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class TextScores:
    """Figures over all rows, 0 to 100, and how they were made.

    Attributes:
        values: Of each of `TEXT_METRICS`.
        signatures: sacrebleu's signature of `bleu` and `chrf`.
    """

    values: dict[str, float]
    signatures: dict[str, str]


def score_texts(hypotheses: Sequence[str], references: Sequence[str]) -> TextScores:
    """Compare generated texts with one reference each.

    Args:
        hypotheses: Generated.
        references: Expected, in the same order.

    Raises:
        ValueError: There are none, or not as many of both.
    """
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError("as many references as hypotheses, and at least one")
    values: dict[str, float] = {}
    signatures: dict[str, str] = {}
    for name, metric in _corpus_metrics().items():
        values[name] = float(metric.corpus_score(list(hypotheses), [list(references)]).score)
        signatures[name] = str(metric.get_signature())
    values |= {name: 100 * value for name, value in rouge(hypotheses, references).items()}
    pairs = zip(hypotheses, references, strict=True)
    same = sum(ours.strip() == theirs.strip() for ours, theirs in pairs)
    values["exact_match"] = 100 * same / len(references)
    return TextScores(values, signatures)


def _corpus_metrics() -> dict[str, Any]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return {"bleu": BLEU(), "chrf": CHRF()}


def rouge(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L over rows, 0 to 1.

    >>> scores = rouge(["the cat was on the mat"], ["The cat sat on the mat."])
    >>> {name: round(score, 3) for name, score in scores.items()}
    {'rouge1': 0.833, 'rouge2': 0.6, 'rougeL': 0.833}
    """
    totals = {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        ours, theirs = _words(hypothesis), _words(reference)
        totals["rouge1"] += _ngram_f1(ours, theirs, 1)
        totals["rouge2"] += _ngram_f1(ours, theirs, 2)
        totals["rougeL"] += _f1(_common_length(ours, theirs), len(ours), len(theirs))
    return {name: total / len(references) for name, total in totals.items()}


@lru_cache(maxsize=4096)
def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


def _ngram_f1(ours: Sequence[str], theirs: Sequence[str], size: int) -> float:
    def grams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
        return Counter(tuple(words[n : n + size]) for n in range(len(words) - size + 1))

    found, wanted = grams(ours), grams(theirs)
    return _f1((found & wanted).total(), found.total(), wanted.total())


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0


def _common_length(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Length of the longest common subsequence, one row of the table at a time."""
    row = [0] * (len(theirs) + 1)
    for word in ours:
        before = 0  # the value up and to the left
        for index, other in enumerate(theirs, 1):
            above = row[index]
            row[index] = before + 1 if word == other else max(above, row[index - 1])
            before = above
    return row[-1]
