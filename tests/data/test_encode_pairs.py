import gzip
import json

import numpy as np
import pytest

from qlora_trainer.data.dataset import build_dataset
from qlora_trainer.data.encode_pairs import PairEncoder
from qlora_trainer.data.read import DataSource
from qlora_trainer.errors import UserError
from tests.data.pair_tokenizers import t5_like

PAIR = {"source": "The capital of France", "target": "Die Hauptstadt von Frankreich"}


@pytest.fixture(scope="module")
def tokenizer():
    return t5_like()


def encoder(tokenizer, **settings):
    limits = {"max_source_tokens": 60, "max_target_tokens": 60}
    return PairEncoder(tokenizer, **{**limits, **settings})


def build(tmp_path, rows, pairs, *, columns=None, name="a.jsonl", content=None, **settings):
    path = tmp_path / name
    text = content if content is not None else "\n".join(json.dumps(row) for row in rows).encode()
    path.write_bytes(text)
    return build_dataset(
        [DataSource(str(path), columns=columns or {})],
        pairs,
        max_seq_len=pairs.max_source_tokens,
        over_length=pairs.over_length,
        cache_dir=tmp_path / "cache",
    )


ROWS = {
    "source-target": (PAIR, {}),
    "prompt-completion": ({"prompt": PAIR["source"], "completion": PAIR["target"]}, {}),
    "columns": ({"article": PAIR["source"], "summary": PAIR["target"]},
                {"source": "article", "target": "summary"}),
    "translation": ({"id": 1, "translation": {"en": PAIR["source"], "de": PAIR["target"]}},
                    {"source": "translation.en", "target": "translation.de"}),
    "alpaca": ({"instruction": PAIR["source"], "input": "", "output": PAIR["target"]}, {}),
    "messages": ({"messages": [{"role": "user", "content": PAIR["source"]},
                               {"role": "assistant", "content": PAIR["target"]}]}, {}),
    "sharegpt": ({"conversations": [{"from": "human", "value": PAIR["source"]},
                                    {"from": "gpt", "value": PAIR["target"]}]}, {}),
}  # fmt: skip


@pytest.mark.parametrize("format", ROWS)
def test_every_format_becomes_the_same_pair(tmp_path, tokenizer, format):
    row, columns = ROWS[format]
    data = build(tmp_path, [row], encoder(tokenizer), columns=columns)
    assert data.input_ids(0).tolist() == tokenizer(PAIR["source"])["input_ids"]
    assert data.column(0, "target").tolist() == tokenizer(PAIR["target"])["input_ids"]
    assert data.reference(0) == PAIR["target"]


@pytest.mark.parametrize("format", ROWS)
def test_what_is_to_be_predicted_needs_no_target(tmp_path, tokenizer, format):
    row, columns = ROWS[format]
    row = json.loads(json.dumps(row))
    for field in ("target", "completion", "output", "summary"):
        row.pop(field, None)
    if format == "translation":
        del row["translation"]["de"]
    for turns in (row.get("messages"), row.get("conversations")):
        if turns:
            turns.pop()
    data = build(tmp_path, [row], encoder(tokenizer, labelled=False), columns=columns)
    assert data.input_ids(0).tolist() == tokenizer(PAIR["source"])["input_ids"]
    assert "labels" not in encoder(tokenizer, labelled=False).collate(data, [0])


def test_a_dialogue_is_flattened_with_its_roles(tmp_path, tokenizer):
    turns = [("system", "Save"), ("user", "The"), ("assistant", "capital"), ("user", "France"),
             ("assistant", "Paris")]  # fmt: skip
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    data = build(tmp_path, [row], encoder(tokenizer))
    text = "Save\n\nuser: The\nassistant: capital\nuser: France"
    assert data.input_ids(0).tolist() == tokenizer(text)["input_ids"]
    assert data.reference(0) == "Paris"


def test_the_prefix_stands_before_the_source_alone(tmp_path, tokenizer):
    data = build(tmp_path, [PAIR], encoder(tokenizer, prefix="user: "))
    assert data.input_ids(0).tolist() == tokenizer("user: " + PAIR["source"])["input_ids"]
    assert data.column(0, "target").tolist() == tokenizer(PAIR["target"])["input_ids"]


def test_a_target_ends_with_eos_once_whatever_the_tokenizer_does(tmp_path, tokenizer):
    for kind in (tokenizer, t5_like(ends=False)):
        data = build(tmp_path, [PAIR], encoder(kind))
        assert data.column(0, "target").tolist().count(1) == 1
        assert data.column(0, "target")[-1] == 1


def test_batches_are_padded_and_only_targets_are_labels(tmp_path, tokenizer):
    pairs = encoder(tokenizer)
    rows = [PAIR, {"source": "Save and continue", "target": "Sichern und weiter bearbeiten"}]
    data = build(tmp_path, rows, pairs)
    batch = pairs.collate(data, [1, 0])
    for number, index in enumerate((1, 0)):
        kept = batch["attention_mask"][number].bool()
        assert batch["input_ids"][number][kept].tolist() == data.input_ids(index).tolist()
        assert (batch["input_ids"][number][~kept] == tokenizer.pad_token_id).all()
        labels = batch["labels"][number]
        assert labels[labels != -100].tolist() == data.column(index, "target").tolist()


def test_truncation_keeps_the_sources_end_token_and_counts(tmp_path, tokenizer):
    pairs = encoder(tokenizer, max_source_tokens=5, max_target_tokens=4, over_length="truncate")
    data = build(tmp_path, [PAIR], pairs)
    full, target = (tokenizer(PAIR[side])["input_ids"] for side in ("source", "target"))
    assert data.input_ids(0).tolist() == [*full[:4], 1]
    assert data.column(0, "target").tolist() == target[:4]
    assert data.counts["lost_tokens"] == len(full) - 5 + len(target) - 4
    assert data.counts["lost_trained_tokens"] == len(target) - 4
    assert data.counts["cut_answers"] == 1
    assert "trained without an end: 1" in pairs.findings(data).warnings[0]


def test_rows_with_long_targets_are_dropped_and_counted(tmp_path, tokenizer):
    pairs = encoder(tokenizer, max_target_tokens=4, over_length="drop")
    data = build(tmp_path, [PAIR, {"source": "Paris", "target": "the"}], pairs)
    assert len(data) == 1
    assert data.counts["long_rows"] == 1


def test_rows_that_only_copy_are_told(tmp_path, tokenizer):
    pairs = encoder(tokenizer)
    data = build(tmp_path, [PAIR, {"source": "Paris", "target": "Paris"}], pairs)
    assert "rows whose target is their source: 1" in pairs.findings(data).warnings[0]
    assert pairs.findings(data).facts[0][0] == "target tokens"
    assert pairs.pieces(data, 0)[2] == (tokenizer.decode(data.column(0, "target")), True)


def test_the_identity_knows_prefix_and_limits(tokenizer):
    kinds = [{}, {"prefix": "x"}, {"max_target_tokens": 9}, {"over_length": "drop"}]
    assert len({encoder(tokenizer, **kind).identity for kind in kinds}) == 4


def bad(*rows, columns=None, **settings):
    return [json.dumps(row) if isinstance(row, dict) else row for row in rows], columns, settings


SURROGATE = '{"source": "a", "target": "\\ud83d"}'
BAD = {
    "missing target": (bad(PAIR, {"source": "a"}), r"a\.jsonl:2: missing `target` \(the row has"),
    "null source": (bad(PAIR, {**PAIR, "source": None}), r":2: missing `source`.*name the columns"),
    "empty target": (bad({**PAIR, "target": "  "}), r":1: `target` is empty; write it or drop"),
    "empty source": (bad(PAIR, {**PAIR, "source": ""}), r":2: `source` is empty"),
    "target is a number": (bad({**PAIR, "target": 7}), r":1: `target` is a number, not text"),
    "several references": (bad({**PAIR, "target": ["a", "b"]}), r":1: `target` is a list, not"),
    "half a character": (bad(SURROGATE), r":1: `target` holds half a character"),
    "language not named": (
        bad({"translation": {"en": "a", "de": "b"}}),
        r":1: `translation` holds en, de; which is source.*columns: \{source: translation\.en",
    ),
    "language not there": (
        bad({"translation": {"en": "a"}},
            columns={"source": "translation.en", "target": "translation.fr"}),
        r":1: missing `target`",
    ),
    "unknown columns": (
        bad({"article": "a", "highlights": "b"}),
        r"rows have article, highlights; known are source-target: .*target: summary",
    ),
    "plain text": (bad({"text": "a"}), r"no source and target are recognised: the rows have text"),
    "no answer in the chat": (
        bad({"messages": [{"role": "user", "content": "a"}]}),
        r":1: `messages` has no assistant turn",
    ),
    "chat that ends in a tool call": (
        bad({"messages": [{"role": "user", "content": "a"},
                          {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}]}),
        r":1: the last answer is a tool call",
    ),
    "another script": (bad({**PAIR, "target": "日本"}), r":1: the tokenizer knows no character of"),
    "source too long": (
        bad(PAIR, {**PAIR, "source": "Paris " * 90}),
        r"data\.max_seq_len = 60: 1 of 2 rows .*a\.jsonl:2: \d+ tokens",
    ),
    "target too long": (
        bad(PAIR, PAIR, max_target_tokens=3),
        r":1: its target has \d+ tokens, task_settings\.max_target_len = 3; .*:2: its target has",
    ),
    "broken line": (bad(PAIR, '{"source": '), r"a\.jsonl:2: broken JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_pairs_are_refused_with_their_place_and_a_way_out(tmp_path, tokenizer, case):
    (lines, columns, settings), message = BAD[case]
    with pytest.raises(UserError, match=rf"(?s){message}"):
        build(
            tmp_path, [], encoder(tokenizer, **settings), columns=columns,
            content="\n".join(lines).encode(),
        )  # fmt: skip
    assert not list((tmp_path / "cache").glob("*/rows.arrow"))


def test_bad_pairs_in_other_files_have_their_place_too(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"(?s)a\.csv:3: `target` is empty"):
        build(tmp_path, [], encoder(tokenizer), name="a.csv", content=b"source,target\na,b\nc,\n")
    packed = gzip.compress(b'{"source": "a"}')
    with pytest.raises(UserError, match="the rows have source; known"):
        build(tmp_path, [], encoder(tokenizer), name="b.jsonl.gz", content=packed)


@pytest.mark.parametrize("token", ["eos", "pad"])
def test_a_tokenizer_without_a_needed_token_is_refused(token):
    tokenizer = t5_like()
    setattr(tokenizer, f"{token}_token", None)
    with pytest.raises(UserError, match=f"no {token.upper()} token"):
        encoder(tokenizer)


def test_equal_rows_have_equal_hashes_and_other_targets_others(tmp_path, tokenizer):
    data = build(tmp_path, [PAIR, {**PAIR, "target": "Paris"}, PAIR], encoder(tokenizer))
    assert data.hashes[0] == data.hashes[2]
    assert len(np.unique(data.hashes)) == 2
