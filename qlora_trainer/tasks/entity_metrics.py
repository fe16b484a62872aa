"""How well entities are found: precision, recall and F1 over whole entities, per type and in all.

An entity counts as found only if type, first and last word are right (Tjong Kim Sang and De
Meulder, CoNLL-2003), entities being what strict IOB2 says they are: an `I-` that no `B-` began
belongs to none. The figures are those of `seqeval` with `mode="strict", scheme=IOB2`, to which the
tests hold them; that package brings all of scikit-learn, so it is no dependency of a run. Where
nothing was predicted or expected, a ratio is 0.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_trainer.data.tags import entity_spans


@dataclass(frozen=True)
class EntityScore:
    """Counts of one entity type, or of several together."""

    found: int = 0
    predicted: int = 0
    expected: int = 0

    @property
    def precision(self) -> float:
        """Share of the predicted entities that are right."""
        return self.found / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """Share of the expected entities that were found."""
        return self.found / self.expected if self.expected else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of both."""
        return 2 * self.found / (self.predicted + self.expected) if self.found else 0.0


def count_entities(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> dict[str, EntityScore]:
    """Counts by entity type, in alphabetical order.

    Args:
        predictions: Tags of every sentence.
        references: The right ones.

    Raises:
        ValueError: Sentences or words differ in number.
    """
    found: Counter[str] = Counter()
    predicted: Counter[str] = Counter()
    expected: Counter[str] = Counter()
    for ours, theirs in zip(predictions, references, strict=True):
        if len(ours) != len(theirs):
            raise ValueError(f"{len(ours)} predicted tags for {len(theirs)} words")
        guessed, right = set(entity_spans(ours)), set(entity_spans(theirs))
        found.update(kind for kind, _, _ in guessed & right)
        predicted.update(kind for kind, _, _ in guessed)
        expected.update(kind for kind, _, _ in right)
    return {
        kind: EntityScore(found[kind], predicted[kind], expected[kind])
        for kind in sorted(predicted | expected)
    }


def together(scores: dict[str, EntityScore]) -> EntityScore:
    """All types counted as one: the micro average."""
    values = list(scores.values())
    return EntityScore(
        sum(score.found for score in values),
        sum(score.predicted for score in values),
        sum(score.expected for score in values),
    )


def averages(scores: dict[str, EntityScore]) -> dict[str, float]:
    """`precision`, `recall`, `f1` (micro), the same as `macro_...`, and `weighted_f1`."""
    whole = together(scores)
    values = list(scores.values())
    count = max(1, len(values))
    return {
        "precision": whole.precision,
        "recall": whole.recall,
        "f1": whole.f1,
        "macro_precision": sum(score.precision for score in values) / count,
        "macro_recall": sum(score.recall for score in values) / count,
        "macro_f1": sum(score.f1 for score in values) / count,
        "weighted_f1": sum(score.f1 * score.expected for score in values) / max(1, whole.expected),
    }


def entity_report(scores: dict[str, EntityScore]) -> str:
    """A table of the types and their averages, for people."""
    width = max([len("macro average"), *map(len, scores)])
    lines = [f"{'':{width}}  precision  recall      f1  entities"]
    expected = together(scores).expected

    def line(name: str, figures: tuple[float, float, float], count: int) -> str:
        precision, recall, f1 = figures
        return f"{name:{width}}  {precision:9.3f}  {recall:6.3f}  {f1:6.3f}  {count:8d}"

    lines += [
        line(kind, (score.precision, score.recall, score.f1), score.expected)
        for kind, score in scores.items()
    ]
    mean = averages(scores)
    micro = (mean["precision"], mean["recall"], mean["f1"])
    macro = (mean["macro_precision"], mean["macro_recall"], mean["macro_f1"])
    lines += [line("micro average", micro, expected), line("macro average", macro, expected)]
    if not together(scores).predicted:
        lines += ["", "no entity was predicted at all"]
    return "\n".join(lines)
