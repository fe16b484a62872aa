"""BLEU and chrF are sacrebleu's; ROUGE is held against values that `rouge-score` 0.1.2 printed."""

import random

import pytest

from qlora_trainer.tasks.text_metrics import TEXT_METRICS, rouge, score_texts

# (reference, hypothesis, rouge1, rouge2, rougeL): RougeScorer(use_stemmer=False), F1
ROUGE_SCORE = [
    ("The cat sat on the mat.", "the cat was on the mat", 0.833333, 0.6, 0.833333),
    ("A quick brown fox, 3 jumps", "the lazy dog sleeps", 0, 0, 0),
    ("police killed the gunman", "police kill the gunman", 0.75, 0.333333, 0.75),
    ("", "x y", 0, 0, 0),
    ("one two three four five", "five four three two one one", 0.909091, 0, 0.181818),
]


@pytest.mark.parametrize(("reference", "hypothesis", "one", "two", "longest"), ROUGE_SCORE)
def test_rouge_is_what_rouge_score_gives(reference, hypothesis, one, two, longest):
    found = rouge([hypothesis], [reference])
    assert found == pytest.approx({"rouge1": one, "rouge2": two, "rougeL": longest}, abs=1e-6)


def test_rouge_of_many_rows_is_what_rouge_score_gives():
    random.seed(0)
    words = ["a", "b", "c", "d", "e", "f", "g"]

    def text():
        return " ".join(random.choices(words, k=random.randint(1, 12)))

    rows = [(text(), text()) for _ in range(200)]
    found = rouge([hypothesis for _, hypothesis in rows], [reference for reference, _ in rows])
    expected = {"rouge1": 0.3763922, "rouge2": 0.0762610, "rougeL": 0.2968961}
    assert found == pytest.approx(expected, abs=1e-6)


def test_letters_outside_ascii_are_letters():
    assert rouge(["Größe ändern"], ["größe ändern"])["rouge2"] == 1.0
    assert rouge(["GRÖßER"], ["GR SSER"])["rouge1"] == 0.0


def test_bleu_and_chrf_say_how_they_were_made():
    texts = ["The cat sat on the mat .", "It is raining today in Paris ."]
    same = score_texts(texts, texts)
    assert set(same.values) == set(TEXT_METRICS)
    assert all(value == pytest.approx(100) for value in same.values.values())
    assert "tok:13a" in same.signatures["bleu"]
    assert "nc:6" in same.signatures["chrf"]


def test_bleu_is_the_published_formula():
    # 4-gram BLEU of one row by hand: precisions 6/7, 4/6, 2/5, 1/4, length 7 against 7
    found = score_texts(["a b c d x e f"], ["a b c d e f g"]).values["bleu"]
    precisions = (6 / 7) * (4 / 6) * (2 / 5) * (1 / 4)
    assert found == pytest.approx(100 * precisions**0.25)


def test_exact_matches_do_not_mind_space_around():
    assert score_texts([" yes", "no"], ["yes\n", "yes"]).values["exact_match"] == 50


def test_unlike_numbers_of_texts_are_refused():
    with pytest.raises(ValueError, match="as many references"):
        score_texts(["a"], [])
