import json

import pytest

from qlora_trainer.data.dataset import build_dataset
from qlora_trainer.data.encode_answers import AnswersEncoder
from qlora_trainer.data.read import DataSource
from qlora_trainer.errors import UserError
from tests.data.conftest import byte_level
from tests.data.word_tokenizers import bert_like

CONTEXT = "Zoe lives in Paris, the capital of France."
ROW = {"id": "q1", "question": "Where is Zoe?", "context": CONTEXT,
       "answers": {"text": ["Paris"], "answer_start": [13]}}  # fmt: skip
FLAT = {key: ROW[key] for key in ("id", "question", "context")}
NONE = {**FLAT, "answers": {"text": [], "answer_start": []}}
SQUAD = {"version": "v2.0", "data": [{"title": "Zoe", "paragraphs": [{"context": CONTEXT, "qas": [
    {"id": "q1", "question": "Where is Zoe?", "is_impossible": False,
     "answers": [{"text": "Paris", "answer_start": 13}]}]}]}]}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return bert_like()


def jsonl(*rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


def encoder(tokenizer, **settings):
    return AnswersEncoder(tokenizer, **{"max_seq_len": 64, "stride": 4, **settings})


def build(tmp_path, content, encoder, *, name="a.jsonl", columns=None):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return build_dataset(
        [DataSource(str(path), columns=columns or {})],
        encoder,
        max_seq_len=encoder.max_seq_len,
        over_length=encoder.over_length,
        cache_dir=tmp_path / "cache",
    )


SOURCES = {
    "squad": ("a.json", json.dumps(SQUAD), {}),
    "squad, pretty": ("a.json", json.dumps(SQUAD, indent=2), {}),
    "lists": ("a.jsonl", jsonl(ROW), {}),
    "objects": ("a.jsonl", jsonl({**FLAT, "answers": SQUAD["data"][0]["paragraphs"][0]["qas"][0]
                                  ["answers"]}), {}),
    "flat": ("a.jsonl", jsonl({**FLAT, "answer": "Paris", "answer_start": 13}), {}),
    "columns": ("a.jsonl", jsonl({"id": "q1", "q": ROW["question"], "passage": CONTEXT,
                                  "span": "Paris", "at": 13}),
                {"question": "q", "context": "passage", "answer": "span", "answer_start": "at"}),
    "csv": ("a.csv", f'id,question,context,answer,answer_start\nq1,Where is Zoe?,"{CONTEXT}",'
            "Paris,13\n", {}),
    "several": ("a.jsonl", jsonl({**FLAT, "answers": {"text": ["Paris", "Paris"],
                                                      "answer_start": [13, 13]}}), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_every_file_becomes_the_same_row(tmp_path, tokenizer, name):
    file, content, columns = SOURCES[name]
    data = build(tmp_path, content, encoder(tokenizer), name=file, columns=columns)
    expected = tokenizer(ROW["question"], CONTEXT)
    assert data.input_ids(0).tolist() == expected["input_ids"]
    assert data.column(0, "types").tolist() == expected["token_type_ids"]
    first, last = data.column(0, "answer").tolist()
    assert tokenizer.decode(data.input_ids(0)[first : last + 1].tolist()) == "paris"
    reference = data.reference(0)
    assert (reference["id"], reference["answers"], reference["starts"]) == ("q1", ["Paris"], [13])


@pytest.mark.parametrize(
    "answer",
    [
        {"answers": {"text": [], "answer_start": []}},
        {"answers": []},
        {"answer": "", "answer_start": None},
        {"answer": None},
        {"is_impossible": True},
        {"answers": [], "is_impossible": True},
    ],
)
def test_no_answer_is_the_position_that_means_so(tmp_path, tokenizer, answer):
    data = build(tmp_path, jsonl({**FLAT, **answer}), encoder(tokenizer))
    assert data.column(0, "answer").tolist() == [0, 0]
    assert tokenizer.convert_ids_to_tokens(int(data.input_ids(0)[0])) == "[CLS]"
    assert data.reference(0)["answers"] == []


@pytest.mark.parametrize("length", [24, 31, 40])
def test_windows_are_those_of_transformers(tmp_path, tokenizer, length):
    """Its own cutting of overlong pairs is the plain twin; where answers lie is looked up in it."""
    context = " ".join(f"{word} is the capital of {word}x ." for word in "abcdefgh")
    start = context.index("dx")
    row = {**FLAT, "context": context, "answers": {"text": ["dx"], "answer_start": [start]}}
    data = build(tmp_path, jsonl(row), encoder(tokenizer, max_seq_len=length, stride=6))
    twin = tokenizer(
        row["question"], context, truncation="only_second", max_length=length, stride=6,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    assert [data.input_ids(i).tolist() for i in range(len(data))] == twin["input_ids"]
    for index, offsets in enumerate(twin["offset_mapping"]):
        sides = twin.sequence_ids(index)
        inside = [n for n, span in enumerate(offsets)
                  if sides[n] == 1 and start <= span[0] and span[1] <= start + 2]  # fmt: skip
        expected = [inside[0], inside[-1]] if len(inside) == 2 else [0, 0]
        assert data.column(index, "answer").tolist() == expected
        first, last = data.column(index, "context").tolist()
        assert data.column(index, "offsets").tolist() == [x for s in offsets[first:last] for x in s]
    assert sum(data.column(i, "answer")[0] > 0 for i in range(len(data))) >= 1


def test_a_tokenizer_without_token_types_has_none(tmp_path):
    tokenizer = byte_level(["<s>", "</s>"], eos="</s>", bos="<s>", add_bos=True)
    maker = encoder(tokenizer, max_seq_len=128)
    data = build(tmp_path, jsonl(ROW), maker)
    assert "token_type_ids" not in maker.collate(data, [0])
    first, last = data.column(0, "answer").tolist()
    assert tokenizer.decode(data.input_ids(0)[first : last + 1].tolist()).strip() == "Paris"


def test_a_batch_tells_where_the_context_is(tmp_path, tokenizer):
    maker = encoder(tokenizer)
    data = build(tmp_path, jsonl(ROW, {**FLAT, "question": "Who?", "answers": []}), maker)
    batch = maker.collate(data, [0, 1])
    assert {len(tensor) for tensor in batch.values()} == {2}
    for row in range(2):
        told = [CONTEXT[a:b].lower() for a, b in batch["offsets"][row].tolist() if a >= 0]
        assert "".join(told) == CONTEXT.lower().replace(" ", "")
    assert batch["attention_mask"].sum(1).tolist() == data.lengths.tolist()


def test_what_is_to_be_predicted_needs_no_answers(tmp_path, tokenizer):
    maker = encoder(tokenizer, labelled=False)
    data = build(tmp_path, jsonl(FLAT), maker)
    assert "answer" not in maker.collate(data, [0])
    assert data.reference(0)["answers"] is None


@pytest.mark.parametrize("policy", ["raise", "truncate", "drop"])
def test_a_question_that_leaves_no_room_follows_the_policy(tmp_path, tokenizer, policy):
    long = {**ROW, "question": "who is " * 20}
    maker = encoder(tokenizer, max_seq_len=32, over_length=policy)
    if policy == "raise":
        with pytest.raises(UserError, match=r"a\.jsonl:2: its question has 40 tokens"):
            build(tmp_path, jsonl(ROW, long), maker)
        return
    data = build(tmp_path, jsonl(ROW, long), maker)
    assert max(data.lengths) <= 32
    questions = [data.reference(index)["question"] for index in range(len(data))]
    assert (long["question"] in questions) == (policy == "truncate")
    assert data.counts["lost_tokens"] > 0


def test_the_gate_tells_answers_that_cannot_be_learned(tmp_path, tokenizer):
    whole = {**FLAT, "answers": {"text": [CONTEXT], "answer_start": [0]}}
    maker = encoder(tokenizer, max_seq_len=20, max_answer_tokens=3)
    data = build(tmp_path, jsonl(ROW, whole, NONE), maker)
    found = maker.findings(data)
    assert found.labels == [("answer", 2), ("no answer", 1)]
    assert ("questions", "3") in found.facts
    assert "no window holds whole" in found.warnings[0]
    assert "a.jsonl:2" in found.warnings[0]
    wide = encoder(tokenizer, max_answer_tokens=3)
    data = build(tmp_path, jsonl(ROW, whole), wide)
    assert "max_answer_len = 3" in wide.findings(data).warnings[0]
    assert [text for text, learned in wide.pieces(data, 0) if learned] == ["Paris"]


def asked(**changes):
    return {**ROW, **changes}


def at(text, start):
    return {"answers": {"text": [text], "answer_start": [start]}}


# name: (file name, content, what the message must say)
BAD = {
    "no columns": ("a.jsonl", jsonl({"text": "x"}),
                   "no `question`, `context` and `answers` or `answer` in the rows, which have "
                   "text; name the columns"),
    "missing context": ("a.jsonl", jsonl(ROW, {"question": "?", "answers": []}),
                        r"a\.jsonl:2: missing `context`"),
    "empty question": ("a.jsonl", jsonl(ROW, asked(question=" ")), r"a\.jsonl:2: `question` is em"),
    "context is a list": ("a.jsonl", jsonl(ROW, asked(context=["x"])),
                          r"a\.jsonl:2: `context` is a list, not a string"),
    "missing answers": ("a.jsonl", jsonl(ROW, FLAT), r"a\.jsonl:2: neither `answers` nor `answer`"),
    "shifted by one": ("a.jsonl", jsonl(ROW, asked(**at("Paris", 14))),
                       r"a\.jsonl:2: the answer 'Paris' does not stand at character 14.*'aris,'; "
                       r"it stands at 13: mend"),
    "bytes counted": ("a.jsonl", jsonl(ROW, asked(context="Zoé, Åsa, Paris", **at("Paris", 12))),
                      r"a\.jsonl:2: .*stands at 10.*characters are counted, not bytes"),
    "nowhere": ("a.jsonl", jsonl(ROW, asked(**at("Rome", 13))),
                r"a\.jsonl:2: .*it stands nowhere in the context"),
    "beyond the end": ("a.jsonl", jsonl(ROW, asked(**at("Paris", 999))), "beyond its end"),
    "negative start": ("a.jsonl", jsonl(ROW, asked(**at("Paris", -1))), "before its beginning"),
    "start is missing": ("a.jsonl", jsonl(ROW, {**FLAT, "answer": "Paris"}),
                         r"a\.jsonl:2: `answer_start` is missing; say at which character"),
    "start is a word": ("a.jsonl", jsonl(ROW, asked(**at("Paris", "there"))),
                        r"a\.jsonl:2: `answer_start` is 'there', not a whole number"),
    "fewer starts": ("a.jsonl", jsonl(ROW, asked(answers={"text": ["Paris", "Zoe"],
                                                          "answer_start": [13]})),
                     r"a\.jsonl:2: 2 answer texts but 1 `answer_start`"),
    "answers are strings": ("a.jsonl", jsonl(ROW, asked(answers=["Paris"])),
                            r"a\.jsonl:2: `answers` is a list of another shape"),
    "empty answer": ("a.jsonl", jsonl(ROW, asked(**at(" ", 3))),
                     r"a\.jsonl:2: an answer is empty; where the context holds no answer"),
    "impossible but answered": ("a.jsonl", jsonl(ROW, asked(is_impossible=True)),
                                r"a\.jsonl:2: `is_impossible` is true, yet there is the answer"),
    "possible but unanswered": ("a.jsonl", jsonl(ROW, {**NONE, "is_impossible": False}),
                                r"a\.jsonl:2: `is_impossible` is false, yet there is no answer"),
    "squad, bad span": ("a.json", json.dumps(SQUAD).replace("13", "7"),
                        r"a\.json article 1 paragraph 1 question 1 \(id q1\): the answer 'Paris'"),
    "squad, no questions": ("a.json", json.dumps(SQUAD).replace('"qas"', '"questions"'),
                            r"a\.json article 1 paragraph 1: `qas` is null, not a list"),
    "squad, cut": ("a.json", json.dumps(SQUAD, indent=1)[:-40], r"a\.json:\d+: broken JSON"),
    "several at once": ("a.jsonl", jsonl(asked(question=""), ROW, asked(**at("Rome", 0))),
                        r"2 faults.*a\.jsonl:1: .*a\.jsonl:3: "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_with_their_place_and_the_way_out(tmp_path, tokenizer, name):
    file, content, message = BAD[name]
    with pytest.raises(UserError, match=f"(?s){message}"):
        build(tmp_path, content, encoder(tokenizer), name=file)
    assert not list((tmp_path / "cache").glob("*/meta.json"))
