import pytest
from assets_words import as_question, sentences, split_by_hash


def test_sentences_are_parted_by_blank_lines_and_lone_tabs():
    assert sentences("a\tO\n\t\nb\tO\nc\tO\n\n\n") == ["a\tO", "b\tO\nc\tO"]


@pytest.mark.parametrize(
    ("passage", "answer", "answers"),
    [
        ("in 1864 , 4 men", "4", {"text": ["4"], "answer_start": [10]}),
        ("in 1864", "4", {"text": ["4"], "answer_start": [6]}),
        ("nothing", "unknown", {"text": [], "answer_start": []}),
    ],
)
def test_an_answer_is_looked_up_as_whole_words(passage, answer, answers):
    row = as_question({"passage": passage, "question": "?", "answer": answer})
    assert row == {"question": "?", "context": passage, "answers": answers}


def test_an_answer_that_is_not_in_its_passage_is_left_out():
    assert as_question({"passage": "nothing", "question": "?", "answer": "40,000"}) is None


def test_equal_keys_fall_on_one_side():
    rows = [{"key": key, "row": row} for row in range(5) for key in "abcdef"]
    train, held_out = split_by_hash(rows, 7, lambda row: row["key"])
    assert len(train) + len(held_out) == len(rows)
    assert len(held_out) == 10
    assert not {row["key"] for row in train} & {row["key"] for row in held_out}
