import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.scheme import IOB1, IOB2, IOBES, Entities

from qlora_trainer.data.faults import RowError
from qlora_trainer.data.tags import check_labels, entity_spans, label_names, to_iob2
from qlora_trainer.errors import UserError

KINDS = st.sampled_from(["O", "B-a", "I-a", "B-b", "I-b"])
LONG = st.sampled_from([f"{letter}-{kind}" for letter in "BIES" for kind in "ab"] + ["O"])


def of_seqeval(tags, scheme):
    return [
        (entity.tag, entity.start, entity.end) for entity in Entities([tags], scheme).entities[0]
    ]


@given(tags=st.lists(KINDS, min_size=1, max_size=12))
def test_entities_are_those_of_seqeval_in_strict_iob2(tags):
    assert entity_spans(tags) == of_seqeval(tags, IOB2)


@given(tags=st.lists(KINDS, min_size=1, max_size=12))
def test_iob1_keeps_its_entities_when_it_becomes_iob2(tags):
    """A B- where IOB1 needs none is taken as a beginning, which seqeval's IOB1 does not know."""
    converted = to_iob2(tags, ["x"] * len(tags), "iob1")
    for before, tag, now in zip(["O", *tags], tags, converted, strict=False):
        touches = before != "O" and before[2:] == tag[2:]
        if tag[0] == "B" and not touches:
            return
        assert (now == "O") == (tag == "O")
    assert entity_spans(converted) == of_seqeval(tags, IOB1)


@given(tags=st.lists(LONG, min_size=1, max_size=8))
def test_bioes_keeps_its_entities_or_is_refused(tags):
    try:
        converted = to_iob2(tags, ["x"] * len(tags), "bioes")
    except RowError:
        return
    assert entity_spans(converted) == of_seqeval(tags, IOBES)
    assert to_iob2(converted, ["x"] * len(tags), "iob2") == converted


def test_bilou_is_bioes_in_other_letters():
    assert to_iob2(["U-a", "B-b", "I-b", "L-b"], "wxyz", "bioes") == ["B-a", "B-b", "I-b", "I-b"]


@pytest.mark.parametrize("tags", [["B-a", "O"], ["I-a", "E-a"], ["B-a", "S-a"], ["E-a"], ["B-a"]])
def test_bioes_that_does_not_close_is_refused(tags):
    with pytest.raises(RowError):
        to_iob2(tags, ["x"] * len(tags), "bioes")


def test_a_type_always_has_both_its_tags():
    assert label_names(["O", "I-x", "B-a-b"]) == ["O", "B-a-b", "I-a-b", "B-x", "I-x"]


def test_labels_may_be_tags_or_types():
    assert check_labels(["LOC", "PER"]) == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    assert check_labels(["B-PER", "I-PER", "O"]) == ["B-PER", "I-PER", "O"]
    with pytest.raises(UserError, match=r"task_settings\.labels: PER: list tags"):
        check_labels(["O", "PER"])
    with pytest.raises(UserError, match="I-LOC"):
        check_labels(["O", "I-LOC"])
