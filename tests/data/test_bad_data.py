"""Every kind of bad data we know of, and the message it gets: where it is and what to do.

Each case is written to real files and goes the whole way through `build_dataset`.
"""

import gzip
import json
import os

import pytest

from qlora_trainer.data.dataset import build_dataset, split_eval
from qlora_trainer.data.encode import Encoder
from qlora_trainer.data.read import DataSource
from qlora_trainer.errors import UserError

GOOD = {"prompt": "Is it good?", "completion": " yes"}
CHAT = [{"role": "user", "content": "Is it good?"}, {"role": "assistant", "content": "yes"}]


def lines(*rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()


def chat(*messages, **more):
    return {"messages": list(messages), **more}


# name: (file name, content, what the message must say)
BAD = {
    "broken JSON line": ("a.jsonl", lines(GOOD, '{"prompt": "x", '), r"a\.jsonl:2: broken JSON"),
    "every broken line": (
        "a.jsonl",
        lines("{", GOOD, "]", GOOD, "{{"),
        r"3 faults.*\.jsonl:1: .*\.jsonl:3: .*\.jsonl:5: ",
    ),
    "cut last line": ("a.jsonl", lines(GOOD, GOOD)[:-3], r"a\.jsonl:2: broken JSON: Unterminated"),
    "pretty-printed object": (
        "a.jsonl",
        json.dumps(GOOD, indent=2).encode(),
        "write one JSON object per line",
    ),
    "row is a list": ("a.jsonl", lines(GOOD, "[1, 2]"), r"a\.jsonl:2: a row is a list, not an obj"),
    "row is a string": (
        "a.jsonl",
        lines('"hello"', GOOD),
        r"a\.jsonl:1: a row is a string, not an",
    ),
    "list of lists": ("a.json", b"[[1], [2]]", r"a\.json:1 \(row 1\): a row is a list"),
    "broken JSON list": (
        "a.json",
        b'[\n{"prompt": "a", "completion": "b"},\n{"prompt": "a" "completion": "b"}\n]',
        r"a\.json:3: broken JSON: .*after 1 whole rows",
    ),
    "missing comma in list": (
        "a.json",
        b'[{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b"}]',
        r"a\.json:2: broken JSON: Expecting ','",
    ),
    "list nested too deeply": ("a.json", b"[" * 100_000, r"a\.json:1: JSON nested too deeply"),
    "cut JSON list": ("a.json", b'[{"prompt": "a", "completion": "b"},', r"a\.json:1: broken JSON"),
    "text after the list": (
        "a.json",
        b'[{"prompt": "a", "completion": "b"}]\n[]',
        r"a\.json:2: text after the end of the JSON list",
    ),
    "object of columns": (
        "a.json",
        b'{"data": [{"prompt": "a"}]}',
        "the rows have data; known are",
    ),
    "nested too deeply": ("a.jsonl", b'{"a":' * 100_000, r"a\.jsonl:1: JSON nested too deeply"),
    "not UTF-8": (
        "a.jsonl",
        lines(GOOD) + b'\n{"prompt": "caf\xe9", "completion": "x"}',
        r"a\.jsonl:2: not UTF-8 \(byte 0xe9 at byte 16 of the line\); save the file as UTF-8",
    ),
    "not UTF-8 list": (
        "a.json",
        b'[\n{"prompt": "caf\xe9", "completion": "x"}]',
        r"a\.json:2: not UTF-8",
    ),
    "not UTF-8 CSV": ("a.csv", b"prompt,completion\ncaf\xe9,x\na,b\n", r"a\.csv:2: not UTF-8"),
    "UTF-16": ("a.jsonl", json.dumps(GOOD).encode("utf-16"), r"not UTF-8 but UTF-16"),
    "lone surrogate": (
        "a.jsonl",
        lines(r'{"prompt": "a", "completion": "\ud83d"}'),
        r"a\.jsonl:1: `completion` holds half a character \(a lone surrogate, U\+D83D\)",
    ),
    "empty file": ("a.jsonl", b"", r"a\.jsonl: holds no rows"),
    "blank lines only": ("a.jsonl", b"\n\n  \n", r"a\.jsonl: holds no rows"),
    "empty list": ("a.json", b"[]", r"a\.json: holds no rows"),
    "CSV faults after a line that is not UTF-8": (
        "a.csv",
        b"prompt,completion\ncaf\xe9,x\na,b,c\n",
        r"a\.csv:2: not UTF-8.*a\.csv:3: 3 cells",
    ),
    "CSV header that is not UTF-8": (
        "a.csv",
        b"prompt,caf\xe9\na,b,c\n",
        r"\(1 fault\):\n.*a\.csv:1: not UTF-8",
    ),
    "CSV with a header only": ("a.csv", b"prompt,completion\n", r"a\.csv: holds no rows"),
    "unknown fields": (
        "a.jsonl",
        lines({"question": "a", "answer": "b"}),
        r"format is not recognised: the rows have question, answer; .*columns: \{prompt: question",
    ),
    "preference data": (
        "a.jsonl",
        lines({"prompt": "a", "chosen": "b", "rejected": "c"}),
        "preference data set",
    ),
    "missing field": (
        "a.jsonl",
        lines(GOOD, {"prompt": "a"}),
        r"a\.jsonl:2: missing `completion` \(prompt-completion format; the row has prompt\)",
    ),
    "null field": ("a.jsonl", lines(GOOD, {**GOOD, "prompt": None}), r":2: missing `prompt`"),
    "wrong type": (
        "a.jsonl",
        lines({"prompt": "a", "completion": 3}),
        r":1: `completion` is a number, not text",
    ),
    "text is a list": ("a.jsonl", lines({"text": ["a"]}), r":1: `text` is a list, not text"),
    "empty text": ("a.jsonl", lines({"text": " \n"}), r":1: `text` is empty"),
    "empty completion": (
        "a.jsonl",
        lines({**GOOD, "completion": " "}),
        r":1: `completion` is empt",
    ),
    "empty alpaca output": (
        "a.json",
        json.dumps([{"instruction": "do", "input": "", "output": ""}]).encode(),
        r"\(row 1\): `output` is empty; write the answer or drop the row",
    ),
    "empty instruction": (
        "a.jsonl",
        lines({"instruction": "", "input": "", "output": "x"}),
        "`instruction` and `input` are empty",
    ),
    "messages is text": (
        "a.jsonl",
        lines({"messages": "hi"}),
        "`messages` is a string, not a list",
    ),
    "no messages": ("a.jsonl", lines(chat()), r"`messages` is an empty list"),
    "message is text": ("a.jsonl", lines(chat("hi")), r"`messages\[0\]` is a string, not an"),
    "no role": ("a.jsonl", lines(chat({"content": "hi"})), r"`messages\[0\]` has no `role`"),
    "unknown role": (
        "a.jsonl",
        lines(chat(CHAT[0], {"role": "asistant", "content": "yes"})),
        r":1: `messages\[1\]` has the unknown role 'asistant'; use one of assistant, ",
    ),
    "role is a number": ("a.jsonl", lines(chat({"role": 1, "content": "hi"})), "unknown role 1"),
    "no content": ("a.jsonl", lines(chat({"role": "user"})), r"`messages\[0\]` has no `content`"),
    "image part": (
        "a.jsonl",
        lines(chat({"role": "user", "content": [{"type": "image", "url": "x"}]}, CHAT[1])),
        "has a part of type image",
    ),
    "empty answer": (
        "a.jsonl",
        lines(chat(*CHAT), chat(CHAT[0], {"role": "assistant", "content": ""})),
        r":2: empty answer: `messages\[1\]` \(assistant\) has no text; write the answer or drop",
    ),
    "no assistant turn": (
        "a.jsonl",
        lines(chat(CHAT[0])),
        "no assistant turn: nothing would be trained",
    ),
    "only answer opens the chat": (
        "a.jsonl",
        lines(chat(CHAT[1])),
        "no assistant turn to train .the only one opens the chat",
    ),
    "ShareGPT without value": (
        "a.jsonl",
        lines({"conversations": [{"from": "human"}]}),
        r"`conversations\[0\]` has no `content`",
    ),
    "broken tool call": (
        "a.jsonl",
        lines(
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": "get("},
                ]
            }
        ),
        r"`conversations\[1\]` has a broken tool call",
    ),
    "broken tools": ("a.jsonl", lines(chat(*CHAT, tools="[{")), "`tools` is broken JSON"),
    "tools for a template without": (
        "a.jsonl",
        lines(chat(*CHAT, tools=[{"name": "get_weather"}])),
        "the chat template leaves out `tools`",
    ),
    "too long": (
        "a.jsonl",
        lines(GOOD, {**GOOD, "completion": " yes" * 300}),
        r"max_seq_len = 128: 1 of 2 rows \(50\.0 %\) are longer\. data.max_seq_len: \d+ holds all; "
        r"data.over_length: truncate.*\n.*a\.jsonl:2: \d+ tokens",
    ),
    "CSV with a missing column": ("a.csv", b"prompt,answer\na,b\n", "the rows have prompt, answer"),
    "CSV with too many cells": (
        "a.csv",
        b"prompt,completion\na,b\na,b,c\n",
        r"a\.csv:3: 3 cells under a header of 2; put cells .* in double quotes",
    ),
    "CSV with an open quote": ("a.csv", b'prompt,completion\n"a,b\n', r"a\.csv:2: broken CSV"),
    "CSV with an empty answer": ("a.csv", b"prompt,completion\na,\n", r":2: `completion` is empty"),
    "not a Parquet file": (
        "a.parquet",
        b"PAR1 but no more",
        r"a\.parquet: not a whole Parquet file",
    ),
    "broken gzip": (
        "a.jsonl.gz",
        b"\x1f\x8b but no more",
        r"a\.jsonl\.gz: broken gzip file|invalid",
    ),
    "cut gzip": ("a.jsonl.gz", gzip.compress(lines(GOOD) * 50)[:-20], "broken gzip file"),
    "unknown type": ("a.docx", b"PK", r"a\.docx is of no known type; known are \.jsonl"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused_with_its_place_and_the_way_out(
    name, tmp_path, chatml_tokenizer, monkeypatch
):
    file, content, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=f"(?s){message}"):
        build_dataset(
            [DataSource(file)], Encoder(chatml_tokenizer), max_seq_len=128, cache_dir=tmp_path / "c"
        )
    assert not list((tmp_path / "c").glob("*")), "a refused data set leaves nothing behind"


def refused(message, tmp_path, tokenizer, *sources, **settings):
    settings = {"max_seq_len": 128, "cache_dir": tmp_path / "c", **settings}
    with pytest.raises(UserError, match=f"(?s){message}"):
        build_dataset(list(sources), Encoder(tokenizer), **settings)


def test_a_mistyped_path_names_the_nearest_file(tmp_path, chatml_tokenizer):
    (tmp_path / "train.jsonl").write_bytes(lines(GOOD))
    wrong = DataSource(str(tmp_path / "trian.jsonl"))
    refused(r"no such file; did you mean .*train\.jsonl\?", tmp_path, chatml_tokenizer, wrong)
    nowhere = DataSource(str(tmp_path / "no" / "train.jsonl"))
    refused("there is no folder", tmp_path, chatml_tokenizer, nowhere)


def test_a_pattern_and_a_folder_without_files_are_refused(tmp_path, chatml_tokenizer):
    pattern = DataSource(str(tmp_path / "*.jsonl"))
    refused("no file matches this pattern", tmp_path, chatml_tokenizer, pattern)
    (tmp_path / "empty").mkdir()
    folder = DataSource(str(tmp_path / "empty"))
    refused("the folder holds no file of type", tmp_path, chatml_tokenizer, folder)


def test_an_empty_split_is_refused(tmp_path, chatml_tokenizer):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_bytes(lines(GOOD))
    source = DataSource(str(tmp_path / "d"), split="validation")
    refused(r"split 'validation' is empty.*has train\.jsonl", tmp_path, chatml_tokenizer, source)


def test_a_hub_data_set_that_cannot_be_fetched_says_what_to_do(tmp_path, chatml_tokenizer):
    source = DataSource("nobody/no-such-data")
    message = "nobody/no-such-data: .*go online .unset HF_HUB_OFFLINE.*give their folder"
    refused(message, tmp_path, chatml_tokenizer, source)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"over_length": "cut"}, "over_length = 'cut': must be one of raise, truncate, drop"),
        ({"max_seq_len": 1}, "max_seq_len = 1: must be at least 2"),
    ],
)
def test_impossible_settings_are_refused(settings, message, tmp_path, chatml_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD))
    source = DataSource(str(tmp_path / "a.jsonl"))
    refused(message, tmp_path, chatml_tokenizer, source, **settings)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_an_impossible_weight_is_refused(weight, tmp_path, chatml_tokenizer):
    source = DataSource("a.jsonl", weight=weight)
    refused("must be a positive number", tmp_path, chatml_tokenizer, source)


def test_an_unknown_format_is_refused(tmp_path, chatml_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD))
    source = DataSource(str(tmp_path / "a.jsonl"), format="alpacca")
    refused("format = 'alpacca'.*must be auto or one of", tmp_path, chatml_tokenizer, source)


def test_no_source_is_refused(tmp_path, chatml_tokenizer):
    refused("no data source is given", tmp_path, chatml_tokenizer)


def test_cutting_away_the_whole_answer_is_refused(tmp_path, chatml_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines({"prompt": "x" * 400, "completion": " yes"}))
    source = DataSource(str(tmp_path / "a.jsonl"))
    message = "after cutting .* nothing is trained; raise data.max_seq_len"
    refused(message, tmp_path, chatml_tokenizer, source, over_length="truncate")


def test_dropping_every_row_is_refused(tmp_path, chatml_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines({"prompt": "x" * 400, "completion": " yes"}))
    source = DataSource(str(tmp_path / "a.jsonl"))
    message = "every row is longer than data.max_seq_len = 128; the longest has"
    refused(message, tmp_path, chatml_tokenizer, source, over_length="drop")


def test_a_tokenizer_without_eos_is_refused(chatml_tokenizer):
    chatml_tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        Encoder(chatml_tokenizer)


def test_chats_without_template_are_refused_once_beside_the_faults_of_rows(
    tmp_path, plain_tokenizer
):
    bad = chat({"role": "clown", "content": "Ho"})
    (tmp_path / "a.jsonl").write_bytes(lines(*[chat(*CHAT)] * 300, bad))
    source = DataSource(str(tmp_path / "a.jsonl"))
    message = r"2 faults.*a\.jsonl:1: the tokenizer has no chat template.*a\.jsonl:301: .*clown"
    refused(message, tmp_path, plain_tokenizer, source)


def test_a_template_that_is_no_jinja_is_refused_once_with_its_line(tmp_path, chatml_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines(*[chat(*CHAT)] * 300))
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    encoder = Encoder(chatml_tokenizer, chat_template=str(template))
    with pytest.raises(UserError, match=r"\(1 fault\)(?s:.*)no valid Jinja \(its line 2: "):
        build_dataset(
            [DataSource(str(tmp_path / "a.jsonl"))], encoder, max_seq_len=9, cache_dir=tmp_path
        )
    template.write_bytes(b"caf\xe9 {{ messages }}")
    with pytest.raises(UserError, match=r"model\.chat_template = .*cannot be read as UTF-8 text"):
        Encoder(chatml_tokenizer, chat_template=str(template))


def test_faults_of_all_sources_and_kinds_come_in_one_message(tmp_path, chatml_tokenizer):
    rows = [{"prompt": "a"}] * 60 + [{**GOOD, "completion": ""}]
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD, *rows))
    (tmp_path / "b.jsonl").write_bytes(lines(GOOD, "{"))
    sources = [DataSource(str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl")]
    message = r"62 faults.*a\.jsonl:2: missing.*a\.jsonl:62: `completion` is empty.*b\.jsonl:2: bro"
    refused(message, tmp_path, chatml_tokenizer, *sources)


def test_reading_stops_when_everything_is_wrong(tmp_path, chatml_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD) + b"\n{" * 5000)
    source = DataSource(str(tmp_path / "a.jsonl"))
    refused("stopped reading after 1000 faults", tmp_path, chatml_tokenizer, source)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(tmp_path, chatml_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD))
    (tmp_path / "a.jsonl").chmod(0)
    refused("cannot be read", tmp_path, chatml_tokenizer, DataSource(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_an_impossible_share_to_hold_out_is_refused(fraction, tmp_path, chatml_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD, {**GOOD, "completion": " no"}))
    dataset = build_dataset(
        [DataSource(str(tmp_path / "a.jsonl"))],
        Encoder(chatml_tokenizer),
        max_seq_len=128,
        cache_dir=tmp_path / "c",
    )
    with pytest.raises(UserError, match="must be above 0 and below 1"):
        split_eval(dataset, fraction)


def test_holding_out_of_one_row_is_refused(tmp_path, chatml_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD, GOOD))
    dataset = build_dataset(
        [DataSource(str(tmp_path / "a.jsonl"))],
        Encoder(chatml_tokenizer),
        max_seq_len=128,
        cache_dir=tmp_path / "c",
    )
    with pytest.raises(UserError, match="1 distinct rows leave none to train on"):
        split_eval(dataset, 0.5)
