from film_data import Snippet, as_record, question_messages, split_snippets
from hypothesis import given
from hypothesis import strategies as st

ratings = st.floats(-4, 4)
snippets = st.lists(
    st.builds(Snippet, st.text("ab A.\ufffd", min_size=1, max_size=6), ratings), max_size=60
)


@given(snippets, st.integers(0, 5))
def test_splits_share_no_snippet_and_hold_only_clear_ones(given_snippets, held_out):
    train, test = split_snippets(given_snippets, held_out_per_answer=held_out)
    train_keys, test_keys = [s.key for s in train], [s.key for s in test]
    assert not set(train_keys) & set(test_keys)
    assert len(set(train_keys + test_keys)) == len(train_keys + test_keys)
    assert all(abs(s.rating) >= 0.5 and "\ufffd" not in s.text for s in train + test)


@given(snippets)
def test_the_split_does_not_depend_on_the_order_of_distinct_snippets(given_snippets):
    distinct = list({s.key: s for s in given_snippets}.values())
    forwards = split_snippets(distinct, held_out_per_answer=2)
    assert split_snippets(distinct[::-1], held_out_per_answer=2) == forwards


def test_training_rows_are_as_balanced_as_held_out_ones():
    many = [Snippet(f"good {i}", 2.0) for i in range(30)]
    many += [Snippet(f"bad {i}", -2.0) for i in range(50)]
    for part, expected in zip(split_snippets(many, held_out_per_answer=10), (20, 10), strict=True):
        assert [s.answer for s in part].count("positive") == expected
        assert [s.answer for s in part].count("negative") == expected


def test_a_record_is_the_question_and_then_the_answer():
    record = as_record(Snippet("A {braced} bore.", -1.5))
    assert record["messages"][:-1] == question_messages("A {braced} bore.")
    assert record["messages"][-1] == {"role": "assistant", "content": "negative"}
    assert record["messages"][1]["content"].endswith("A {braced} bore.")
