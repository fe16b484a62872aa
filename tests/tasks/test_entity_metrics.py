import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import classification_report
from seqeval.scheme import IOB2

from qlora_trainer.tasks.entity_metrics import averages, count_entities, entity_report

TAGS = st.lists(st.sampled_from(["O", "B-a", "I-a", "B-b", "I-b"]), min_size=1, max_size=8)
SENTENCES = st.lists(
    st.tuples(TAGS, st.randoms(use_true_random=False)).map(
        lambda pair: (pair[0], pair[1].sample(pair[0], len(pair[0])))
    ),
    min_size=1,
    max_size=5,
)


@given(sentences=SENTENCES)
def test_figures_are_those_of_seqeval_in_strict_iob2(sentences):
    right, guessed = [a for a, _ in sentences], [b for _, b in sentences]
    if not any(tag.startswith("B") for tags in right + guessed for tag in tags):
        return  # seqeval has no types to average over then
    twin = classification_report(
        right, guessed, mode="strict", scheme=IOB2, output_dict=True, zero_division=0
    )
    scores = count_entities(guessed, right)
    mean = averages(scores)
    for kind, score in scores.items():
        assert score.precision == pytest.approx(twin[kind]["precision"])
        assert score.recall == pytest.approx(twin[kind]["recall"])
        assert score.f1 == pytest.approx(twin[kind]["f1-score"])
        assert score.expected == twin[kind]["support"]
    for prefix, name in (("", "micro avg"), ("macro_", "macro avg")):
        for ours, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert mean[prefix + ours] == pytest.approx(twin[name][theirs])
    assert mean["weighted_f1"] == pytest.approx(twin["weighted avg"]["f1-score"])


def test_figures_by_hand():
    right = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    guessed = [["B-PER", "O", "O", "B-LOC"], ["O", "B-LOC"]]
    mean = averages(count_entities(guessed, right))
    assert mean["precision"] == mean["recall"] == mean["f1"] == pytest.approx(2 / 3)
    assert mean["macro_f1"] == pytest.approx(0.5)
    report = entity_report(count_entities(guessed, right))
    assert "LOC                1.000   1.000   1.000         2" in report
    assert "micro average" in report
    assert "no entity was predicted" not in report


def test_a_model_that_predicts_nothing_is_told_so():
    report = entity_report(count_entities([["O", "O"]], [["B-LOC", "I-LOC"]]))
    assert report.endswith("no entity was predicted at all")


def test_nothing_to_find_scores_nothing_and_does_not_fail():
    assert averages(count_entities([["O"]], [["O"]]))["f1"] == 0.0


def test_tags_and_words_must_match():
    with pytest.raises(ValueError, match="1 predicted tags for 2 words"):
        count_entities([["O"]], [["O", "O"]])
