import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data.windows import cut_windows, frame_of, owners
from qlora_trainer.errors import UserError
from tests.data.conftest import byte_level
from tests.data.word_tokenizers import bert_like

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=40)


@given(sizes=SIZES, capacity=st.integers(5, 20), overlap=st.integers(0, 30))
def test_windows_fit_move_on_and_lose_nothing(sizes, capacity, overlap):
    windows = cut_windows(sizes, capacity, overlap)
    assert all(sum(sizes[start:end]) <= capacity for start, end in windows)
    pairs = list(itertools.pairwise(windows))
    assert all(a[0] < b[0] and a[1] < b[1] and b[0] <= a[1] for a, b in pairs)
    assert all(sum(sizes[b[0] : a[1]]) <= overlap for a, b in pairs)
    owned = [item for start, end in owners(windows) for item in range(start, end)]
    assert owned == list(range(len(sizes)))
    for (start, end), (begin, stop) in zip(windows, owners(windows), strict=True):
        assert start <= begin < stop <= end


def test_an_item_too_large_is_a_window_alone():
    assert cut_windows([1, 9, 1], 4, 2) == [(0, 1), (1, 2), (2, 3)]


def test_a_frame_is_what_the_tokenizer_puts_around_texts():
    tokenizer = bert_like()
    first, second = "paris", "the capital of france"
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (first, second)]
    expected = tokenizer(first, second)
    ids, types = frame_of(tokenizer, pair=True).join(*parts)
    assert (ids, types) == (expected["input_ids"], expected["token_type_ids"])
    assert frame_of(tokenizer, pair=False).join(parts[1])[0] == tokenizer(second)["input_ids"]


def test_a_frame_may_have_one_side_or_none():
    tokenizer = byte_level(["<s>", "</s>"], eos="</s>", bos="<s>", add_bos=True)
    frame = frame_of(tokenizer, pair=False)
    assert frame.join([7, 8])[0] == [tokenizer.bos_token_id, 7, 8]
    assert frame.size == 1
    assert not frame.typed


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(UserError, match="is not a fast one"):
        frame_of(object(), pair=True)
