import json

import pytest

from qlora_trainer.data.dataset import build_dataset, split_eval
from qlora_trainer.data.encode_tagged_words import TaggedWordsEncoder
from qlora_trainer.data.gate import inspect_rows
from qlora_trainer.data.read import DataSource
from qlora_trainer.errors import UserError
from tests.data.conftest import byte_level, metaspace
from tests.data.word_tokenizers import bert_like

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
ROW = {"tokens": ["Zoe", "lives", "in", "New", "Paris"],
       "tags": ["B-PER", "O", "O", "B-LOC", "I-LOC"]}  # fmt: skip
CSV_OF_JSON = "tokens,tags\n" + ",".join(
    '"' + json.dumps(ROW[name]).replace('"', '""') + '"' for name in ("tokens", "tags")
)
CONLL = "-DOCSTART- -X- O\n\nZoe NN B-PER\nlives VB O\nin IN O\nNew NN B-LOC\nParis NN I-LOC\n"


@pytest.fixture(scope="module")
def tokenizer():
    return bert_like()


def build(tmp_path, content, encoder, *, name="a.jsonl", columns=None):
    path = tmp_path / name
    if not isinstance(content, str):
        content = "\n".join(json.dumps(row) for row in content)
    path.write_text(content, encoding="utf-8")
    return build_dataset(
        [DataSource(str(path), columns=columns or {})],
        encoder,
        max_seq_len=encoder.max_seq_len,
        over_length=encoder.over_length,
        cache_dir=tmp_path / "cache",
    )


def encoder(tokenizer, **settings):
    return TaggedWordsEncoder(tokenizer, **{"labels": LABELS, "max_seq_len": 32, **settings})


SOURCES = {
    "jsonl": ("a.jsonl", json.dumps(ROW), {}),
    "numbers": ("a.jsonl", json.dumps({**ROW, "tags": [3, 0, 0, 1, 2]}), {}),
    "columns": ("a.jsonl", json.dumps({"words": ROW["tokens"], "ner_tags": ROW["tags"]}),
                {"tokens": "words", "tags": "ner_tags"}),
    "json list": ("a.json", json.dumps([ROW]), {}),
    "csv": ("a.csv", "tokens,tags\nZoe lives in New Paris,B-PER O O B-LOC I-LOC\n", {}),
    "csv of JSON": ("a.csv", CSV_OF_JSON, {}),
    "conll": ("a.conll", CONLL, {}),
    "conll, tabs": ("a.bio", CONLL.replace(" ", "\t").replace("\n\n", "\n\t\n"), {}),
    "conll, a column": ("a.conll", "Zoe B-PER x\nlives O x\nin O x\nNew B-LOC x\nParis I-LOC x",
                        {"tags": "column2"}),
    "conll-u comments": ("a.conll", CONLL.replace("Zoe", "# sent_id = 1\nZoe"), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_every_file_becomes_the_same_row(tmp_path, tokenizer, name):
    file, content, columns = SOURCES[name]
    data = build(tmp_path, content, encoder(tokenizer), name=file, columns=columns)
    expected = tokenizer(" ".join(ROW["tokens"]))["input_ids"]
    assert [data.input_ids(index).tolist() for index in range(len(data))] == [expected]
    assert data.reference(0)["words"] == ROW["tokens"]
    assert data.reference(0)["tags"] == ROW["tags"]


def test_the_first_token_of_each_word_learns_its_tag(tmp_path, tokenizer):
    data = build(tmp_path, [ROW], encoder(tokenizer))
    tokens = tokenizer.convert_ids_to_tokens(data.input_ids(0).tolist())
    labels = encoder(tokenizer).collate(data, [0])["labels"][0].tolist()
    learned = [(token, LABELS[label]) for token, label in zip(tokens, labels, strict=True)
               if label != -100]  # fmt: skip
    assert learned == [("z", "B-PER"), ("lives", "O"), ("in", "O"), ("n", "B-LOC"),
                       ("paris", "I-LOC")]  # fmt: skip
    assert tokens[:4] == ["[CLS]", "z", "##o", "##e"]


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_words_are_cut_as_they_are_in_a_text(tmp_path, kind):
    specials = {"eos": "</s>", "bos": "<s>"}
    tokenizer = (byte_level if kind == "bytes" else metaspace)(["<s>", "</s>"], **specials)
    data = build(tmp_path, [ROW], encoder(tokenizer, max_seq_len=64))
    if kind == "bytes":  # this metaspace has tokens across words, which words apart never get
        assert data.input_ids(0).tolist() == tokenizer(" ".join(ROW["tokens"]))["input_ids"]
    assert len(data.column(0, "first")) == len(ROW["tokens"])


def test_a_word_of_which_nothing_is_left_is_unknown_and_not_lost(tmp_path, tokenizer):
    row = {"tokens": ["Paris", "\u200b\ufe0f\x07", "is"], "tags": ["B-LOC", "O", "O"]}
    data = build(tmp_path, [row], encoder(tokenizer))
    assert len(data.column(0, "first")) == 3
    tokens = tokenizer.convert_ids_to_tokens(data.input_ids(0).tolist())
    assert tokens == ["[CLS]", "paris", "[UNK]", "is", "[SEP]"]


@pytest.mark.parametrize("stride", [0, 3, 100])
def test_windows_of_a_long_sentence_answer_for_every_word_once(tmp_path, tokenizer, stride):
    words = [f"{'ab' * (number % 4 + 1)}" for number in range(60)]
    row = {"tokens": words, "tags": ["B-PER" if n % 7 == 0 else "O" for n in range(60)]}
    maker = encoder(tokenizer, max_seq_len=20, stride=stride)
    data = build(tmp_path, [row, ROW], maker)
    parts = [data.reference(index) for index in range(len(data) - 1)]
    assert len(parts) > 3
    assert max(data.lengths) <= 20
    assert [word for part in parts for word in part["words"]] == words
    assert [tag for part in parts for tag in part["tags"]] == row["tags"]
    for index, part in enumerate(parts):
        ids = data.input_ids(index)[data.column(index, "first")].tolist()
        assert tokenizer.convert_ids_to_tokens(ids) == [word[0] for word in part["words"]]


def test_a_split_keeps_the_windows_of_a_sentence_together(tmp_path, tokenizer):
    rows = [
        {"tokens": [f"a{n}", *["x"] * 40, f"b{n}"], "tags": ["O"] * 42} for n in range(700)
    ]  # more windows than the store writes at a time
    data = build(tmp_path, rows, encoder(tokenizer, max_seq_len=16, stride=2))
    assert len(data) > 2048
    train, held = split_eval(data, 0.3, seed=1)
    sides = [{part.where(index) for index in range(len(part))} for part in (train, held)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 210
    assert len(train) + len(held) == len(data)


@pytest.mark.parametrize("policy", ["raise", "truncate", "drop"])
def test_a_word_no_window_holds_follows_the_policy(tmp_path, tokenizer, policy):
    row = {"tokens": ["Paris", "x" * 50], "tags": ["B-LOC", "O"]}
    maker = encoder(tokenizer, max_seq_len=16, over_length=policy)
    if policy == "raise":
        with pytest.raises(UserError, match=r"(?s)data\.max_seq_len = 16: .*a\.jsonl:2: 53 tokens"):
            build(tmp_path, [ROW, row], maker)
        return
    data = build(tmp_path, [ROW, row], maker)
    assert max(data.lengths) <= 16
    assert data.counts["long_rows"] == 1
    words = [word for index in range(len(data)) for word in data.reference(index)["words"]]
    assert (row["tokens"][1] in words) == (policy == "truncate")


def test_what_is_to_be_predicted_needs_no_tags(tmp_path, tokenizer):
    maker = encoder(tokenizer, labelled=False)
    data = build(tmp_path, "Zoe\nlives\n\nin\nParis\n", maker, name="a.conll")
    assert [data.reference(index)["tags"] for index in range(2)] == [None, None]
    labels = maker.collate(data, [0, 1])["labels"]
    assert (labels != -100).sum(1).tolist() == [2, 2]


def test_the_gate_counts_entities_and_shows_them(tmp_path, tokenizer):
    maker = encoder(tokenizer)
    data = build(tmp_path, [ROW, ROW], maker)
    found = maker.findings(data)
    assert found.labels == [("PER", 2), ("LOC", 2)]
    assert ("entities", "4") in found.facts
    assert "LOC (2), PER (2)" in found.warnings[0]
    assert [text for text, learned in maker.pieces(data, 0) if learned] == ["Zoe", "New Paris"]


def test_the_gate_shows_sentences_with_entities_first(tmp_path, tokenizer):
    maker = encoder(tokenizer)
    words = {"tokens": ["so", "it", "is"], "tags": ["O", "O", "O"]}
    rows = [{**words, "tokens": [*words["tokens"][:2], str(number)]} for number in range(15)]
    data = build(tmp_path, [*rows, {"tokens": ["Zoe"], "tags": ["B-PER"]}], maker)
    first, *others = inspect_rows(data, maker).samples
    assert ("Zoe", True) in first.pieces
    assert len(others) == 2


def test_labels_travel_in_the_configuration(tokenizer):
    settings = encoder(tokenizer, labels=["LOC"]).model_settings()
    assert settings == {"num_labels": 3, "id2label": {0: "O", 1: "B-LOC", 2: "I-LOC"},
                        "label2id": {"O": 0, "B-LOC": 1, "I-LOC": 2}}  # fmt: skip


def test_another_setting_is_another_cache(tokenizer):
    identities = {encoder(tokenizer, **change).identity
                  for change in ({}, {"labels": LABELS[:3]}, {"max_seq_len": 31}, {"stride": 1},
                                 {"scheme": "iob1"}, {"labelled": False},
                                 {"over_length": "drop"}, {"numbered": False})}  # fmt: skip
    assert len(identities) == 8


def jsonl(*rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


def tagged(tokens, tags):
    return {"tokens": tokens, "tags": tags}


# name: (file name, content, encoder settings, what the message must say)
BAD = {
    "no columns": ("a.jsonl", jsonl({"text": "x", "label": 1}), {},
                   "no `tokens` and `tags` in the rows, which have text, label; name the columns"),
    "missing tags": ("a.jsonl", jsonl(ROW, {"tokens": ["a"]}), {}, r"a\.jsonl:2: missing `tags`"),
    "lengths differ": ("a.jsonl", jsonl(ROW, tagged(["a", "b"], ["O"])), {},
                       r"a\.jsonl:2: 2 words but 1 tags; give every word one tag"),
    "empty sentence": ("a.jsonl", jsonl(ROW, tagged([], [])), {},
                       r"a\.jsonl:2: `tokens` is empty.*drop the row"),
    "empty word": ("a.jsonl", jsonl(ROW, tagged(["a", " "], ["O", "O"])), {},
                   r"a\.jsonl:2: word 2 of 2 is empty"),
    "word is a number": ("a.jsonl", jsonl(ROW, tagged(["a", 7], ["O", "O"])), {},
                         r"a\.jsonl:2: word 2 is a number, not a string"),
    "I- without B-": ("a.jsonl", jsonl(ROW, tagged(["a", "b"], ["O", "I-LOC"])), {},
                      r"a\.jsonl:2: tag 'I-LOC' of word 2 \('b'\) goes on with an entity that no "
                      r"B-LOC began; .*tag_scheme: iob1"),
    "I- of another type": ("a.jsonl", jsonl(ROW, tagged(["a", "b"], ["B-PER", "I-LOC"])), {},
                           r"a\.jsonl:2: tag 'I-LOC' of word 2"),
    "BIOES": ("a.jsonl", jsonl(ROW, tagged(["a"], ["S-LOC"])), {},
              r"a\.jsonl:2: tag 'S-LOC'.*BIOES scheme; set task_settings\.tag_scheme: bioes"),
    "unknown scheme": ("a.jsonl", jsonl(ROW, tagged(["a"], ["NOUN"])), {},
                       r"a\.jsonl:2: tag 'NOUN' of word 1 \('a'\) is of no known scheme"),
    "unknown label": ("a.jsonl", jsonl(ROW, tagged(["a"], ["B-ORG"])), {},
                      r"a\.jsonl:2: tag 'B-ORG'.*not among the model's labels \(O, B-LOC"),
    "number without names": ("a.jsonl", jsonl(ROW, tagged(["a"], [1])), {"numbered": False},
                             r"a\.jsonl:2: the tag of word 1 is the number 1.*\.labels"),
    "number too large": ("a.jsonl", jsonl(ROW, tagged(["a"], [9])), {},
                         r"a\.jsonl:2: the tag of word 1 is 9, but .* has 5 names"),
    "tag is null": ("a.jsonl", jsonl(ROW, tagged(["a"], [None])), {},
                    r"a\.jsonl:2: the tag of word 1 is null"),
    "conll, a column short": ("a.conll", "a NN O\nb O\n\nc NN O\n", {},
                              r"a\.conll:2: 2 columns, but the file's first word has 3"),
    "conll, bad tag": ("a.conll", "a O\n\nb O\nc I-LOC\n", {},
                       r"a\.conll:3: tag 'I-LOC' of word 2 \('c'\)"),
    "conll as .txt": ("a.txt", "a O\nb O\n", {}, r"under the name \.conll"),
    "empty file": ("a.conll", "\n\n", {}, r"a\.conll: holds no rows"),
    "several at once": ("a.jsonl", jsonl(tagged([], []), ROW, tagged(["a"], ["X"])), {},
                        r"2 faults.*a\.jsonl:1: .*a\.jsonl:3: "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_with_their_place_and_the_way_out(tmp_path, tokenizer, name):
    file, content, settings, message = BAD[name]
    with pytest.raises(UserError, match=f"(?s){message}"):
        build(tmp_path, content, encoder(tokenizer, **settings), name=file)
    assert not list((tmp_path / "cache").glob("*/meta.json"))
