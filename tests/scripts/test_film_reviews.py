import pytest
from film_reviews import EVAL_FILE, Question, parse_answer, read_questions, score_answers


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("positive", "positive"),
        (" Negative.\n", "negative"),
        ("This review is positive but slightly negative", "positive"),
        ("unpositive and negativity", None),
        ("", None),
    ],
)
def test_the_first_whole_word_counts(text, word):
    assert parse_answer(text) == word


def test_an_answer_with_neither_word_is_wrong_and_counted():
    questions = [Question("q", "positive"), Question("q", "negative"), Question("q", "negative")]
    score = score_answers(["I like it", "negative", "Positive!"], questions)
    assert score.right == (False, True, False)
    assert (score.unparseable, score.said_positive) == (1, 1)


def test_the_held_out_questions_are_many_and_balanced():
    questions = read_questions()
    truths = [question.truth for question in questions]
    assert len(truths) >= 400
    assert truths.count("positive") == truths.count("negative")
    assert all(question.review and "Answer with" not in question.review for question in questions)
    fewer = [question.truth for question in read_questions(rows=40)]
    assert fewer.count("positive") == fewer.count("negative") == 20


def test_no_held_out_review_stands_in_training():
    def keys(name):
        path = EVAL_FILE.with_name(name)
        return {" ".join(question.review.lower().split()) for question in read_questions(path)}

    assert not keys("train.jsonl") & keys("eval.jsonl")
