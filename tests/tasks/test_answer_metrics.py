import pytest

from qlora_trainer.tasks.answer_metrics import (
    answer_f1,
    answer_scores,
    exact_match,
    normalize_answer,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Denver Broncos", "denver broncos"),
        ("Santa Clara, California.", "santa clara california"),
        ("a  an the theory", "theory"),
        ("$5,000", "5000"),
        ("Levi's Stadium", "levis stadium"),
        ("“gold”", "“gold”"),  # the official script takes out ASCII punctuation only
        ("The", ""),
    ],
)
def test_answers_are_normalized_as_squad_does(text, normal):
    assert normalize_answer(text) == normal


# by hand, from the definitions of evaluate-v1.1.py and evaluate-v2.0.py
@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("Denver Broncos", ["Denver Broncos", "The Denver Broncos"], 1, 1),
        ("the Broncos", ["Denver Broncos"], 0, 2 / 3),
        ("Levi's Stadium in Santa Clara", ["Levi's Stadium", "Santa Clara, California"], 0, 4 / 7),
        ("gold gold", ["gold"], 0, 2 / 3),
        ("silver", ["gold"], 0, 0),
        ("", ["gold"], 0, 0),
        ("", [], 1, 1),
        ("gold", [], 0, 0),
        ("the", [], 1, 1),
        ("", ["the"], 1, 1),  # the official script leaves out answers that normalize to nothing
    ],
)
def test_scores_of_single_answers(prediction, answers, exact, f1):
    assert exact_match(prediction, answers) == exact
    assert answer_f1(prediction, answers) == pytest.approx(f1)


def test_questions_with_and_without_answers_are_told_apart():
    values, counts = answer_scores(["gold", "the Broncos", "", "x"], [["gold"], ["Denver Broncos"],
                                                                     [], []])  # fmt: skip
    assert values == pytest.approx({
        "exact_match": 50, "f1": 100 * (1 + 2 / 3 + 1) / 4, "has_answer_exact_match": 50,
        "has_answer_f1": 100 * (1 + 2 / 3) / 2, "no_answer_accuracy": 50,
    })  # fmt: skip
    assert counts == {"questions": 4, "has_answer": 2, "no_answer": 2}
    assert "no_answer_accuracy" not in answer_scores(["gold"], [["gold"]])[0]
    with pytest.raises(ValueError, match="as many predictions"):
        answer_scores(["gold"], [])
