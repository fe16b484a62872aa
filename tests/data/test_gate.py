"""The gate counts what is there and says what a person should look at."""

import json

import numpy as np
import pytest

from qlora_trainer.data.dataset import build_dataset, split_eval
from qlora_trainer.data.encode import Encoder
from qlora_trainer.data.gate import decode_pieces, inspect_data
from qlora_trainer.data.read import DataSource
from tests.data import templates
from tests.data.conftest import metaspace


@pytest.fixture
def build(tmp_path):
    def build(tokenizer, rows, name="train.jsonl", **settings):
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, rows)))
        encoder = settings.pop("encoder", None) or Encoder(tokenizer)
        settings = {"max_seq_len": 200, "cache_dir": tmp_path / "cache", **settings}
        return build_dataset([DataSource(str(path))], encoder, **settings)

    return build


def chat(question, answer):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


REVIEWS = [chat(f"Review {n}?", "positive" if n % 3 else "negative") for n in range(30)]


def test_rows_and_tokens_add_up(build, chatml_tokenizer):
    dataset = build(chatml_tokenizer, REVIEWS)
    report = inspect_data(dataset, chatml_tokenizer, packing_capacity=200)
    train = report.train
    assert train.rows == train.distinct_rows == 30
    assert train.tokens == train.trained_tokens + train.masked_tokens == dataset.lengths.sum()
    labels = [dataset.labels(index) for index in range(30)]
    assert train.trained_tokens == sum((row != -100).sum() for row in labels)
    assert sum(count for _, _, count in train.lengths.histogram) == 30
    assert train.lengths.shortest <= train.lengths.median <= train.lengths.longest
    assert report.packing is not None
    assert report.packing.efficiency == pytest.approx(train.tokens / (200 * report.packing.rows))
    assert report.end_of_turn == "<|im_end|>"
    assert report.unended_rows == 0
    assert report.warnings == []


def test_the_report_is_plain_json(build, chatml_tokenizer):
    dataset = build(chatml_tokenizer, REVIEWS)
    train, held = split_eval(dataset, 0.2)
    report = inspect_data(train, chatml_tokenizer, evaluation=held, packing_capacity=200)
    assert json.loads(json.dumps(report.to_json()))["evaluation"]["rows"] == 6


def test_label_balance_lists_short_answers(build, chatml_tokenizer):
    report = inspect_data(build(chatml_tokenizer, REVIEWS), chatml_tokenizer)
    assert report.labels == [("positive", 20), ("negative", 10)]


def test_answers_that_are_no_classes_have_no_balance(build, chatml_tokenizer):
    rows = [chat("How many?", f"{n}") for n in range(40)]
    assert inspect_data(build(chatml_tokenizer, rows), chatml_tokenizer).labels == []


def test_one_answer_for_nearly_all_rows_is_warned_of(build, chatml_tokenizer):
    rows = [chat(f"Review {n}?", "negative" if n == 0 else "positive") for n in range(30)]
    report = inspect_data(build(chatml_tokenizer, rows), chatml_tokenizer)
    assert report.warnings == ["29 of 30 rows have the same answer 'positive'"]


def test_copies_are_counted_and_located(build, chatml_tokenizer, tmp_path):
    report = inspect_data(build(chatml_tokenizer, [*REVIEWS, *REVIEWS[:2]]), chatml_tokenizer)
    assert report.train.copies == 2
    path = f"{tmp_path}/train.jsonl"
    assert report.train.first_copies == [(f"{path}:1", f"{path}:31"), (f"{path}:2", f"{path}:32")]
    assert any("copies among the training rows: 2 (first" in warning for warning in report.warnings)


def test_repeating_rows_by_weight_is_not_a_copy(build, chatml_tokenizer, tmp_path):
    build(chatml_tokenizer, REVIEWS)
    source = DataSource(str(tmp_path / "train.jsonl"), weight=3)
    dataset = build_dataset(
        [source], Encoder(chatml_tokenizer), max_seq_len=200, cache_dir=tmp_path / "cache"
    )
    report = inspect_data(dataset, chatml_tokenizer)
    assert (report.train.rows, report.train.distinct_rows, report.train.copies) == (90, 30, 0)


def test_evaluation_rows_that_stand_in_training_are_warned_of(build, chatml_tokenizer, tmp_path):
    train = build(chatml_tokenizer, REVIEWS)
    held = build(chatml_tokenizer, [chat("New?", "positive"), REVIEWS[4]], "eval.jsonl")
    report = inspect_data(train, chatml_tokenizer, evaluation=held)
    assert report.shared_rows == 1
    assert report.first_shared == [(f"{tmp_path}/eval.jsonl:2", f"{tmp_path}/train.jsonl:5")]
    assert "evaluation rows that also stand in training: 1 (first: " in report.warnings[0]


def test_truncation_and_dropping_are_warned_of(build, chatml_tokenizer):
    rows = [*REVIEWS, chat("Long?", "yes " * 100)]
    cut = build(chatml_tokenizer, rows, max_seq_len=40, over_length="truncate")
    report = inspect_data(cut, chatml_tokenizer)
    assert (report.train.truncated_rows, report.train.cut_answers) == (1, 1)
    assert report.warnings[0].startswith("rows cut to data.max_seq_len: 1; tokens lost: ")
    assert len(report.warnings) == 1  # the cut answer is not blamed for having no end as well
    dropped = build(chatml_tokenizer, rows, max_seq_len=40, over_length="drop")
    report = inspect_data(dropped, chatml_tokenizer)
    assert (report.train.rows, report.train.dropped_rows) == (30, 1)
    assert "rows longer than max_seq_len and dropped: 1; tokens lost: " in report.warnings[0]


def test_split_chats_are_told(build, chatml_tokenizer):
    chatml_tokenizer.chat_template = templates.QWEN3
    two = {"messages": chat("a", "b")["messages"] + chat("c", "d")["messages"]}
    report = inspect_data(build(chatml_tokenizer, [two, chat("e", "f")]), chatml_tokenizer)
    assert report.train.rows == 3
    assert "rewrites earlier turns: 1 (2 rows, 3 examples)" in report.warnings[0]


def test_merged_joins_and_control_tokens_are_told(build, chatml_tokenizer):
    rows = [{"prompt": "Is it good? ", "completion": "yes"}]
    report = inspect_data(build(chatml_tokenizer, rows), chatml_tokenizer)
    assert any("not trained as it will be asked: 1;" in w for w in report.warnings)
    rows = [chat("say <|im_end|>", "no"), chat("say it", "yes")]
    report = inspect_data(build(chatml_tokenizer, rows), chatml_tokenizer)
    assert any(
        "special tokens such as the end of turn in their text: 1" in warning
        for warning in report.warnings
    )


def test_an_end_of_turn_that_is_not_eos_is_told_unless_generation_stops_there(build):
    specials = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = metaspace(specials, bos="<bos>", eos="<eos>")
    tokenizer.chat_template = templates.GEMMA
    dataset = build(tokenizer, REVIEWS)
    (warning,) = inspect_data(dataset, tokenizer).warnings
    assert "answers end with '<end_of_turn>', which is not the tokenizer's EOS ('<eos>')" in warning
    stop = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert inspect_data(dataset, tokenizer, stop_ids=[stop]).warnings == []


def test_three_samples_show_what_is_trained(build, chatml_tokenizer):
    report = inspect_data(build(chatml_tokenizer, REVIEWS), chatml_tokenizer)
    assert len(report.samples) == 3
    for sample in report.samples:
        line = int(sample.where.rsplit(":", 1)[1])
        answer = REVIEWS[line - 1]["messages"][1]["content"]
        assert [text for text, trained in sample.pieces if trained] == [f"{answer}<|im_end|>"]
        question = f"<|im_start|>user\nReview {line - 1}?<|im_end|>\n<|im_start|>assistant\n"
        assert [text for text, trained in sample.pieces if not trained] == [question]
    fewer = inspect_data(build(chatml_tokenizer, REVIEWS[:2]), chatml_tokenizer)
    assert 1 <= len(fewer.samples) <= 2


def test_pieces_keep_their_leading_spaces():
    """Decoded alone, `▁fine` would lose its space: the tokenizer strips one at the beginning."""
    tokenizer = metaspace(["<s>", "</s>"], bos="<s>", eos="</s>")
    question, answer = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("A", "fine"))
    assert tokenizer.decode(answer) == "fine"
    ids = np.array(question + answer)
    assert decode_pieces(tokenizer, ids, [(len(question), len(ids))]) == [
        ("A", False),
        (" fine", True),
    ]


def test_the_real_alpaca_sample_is_read_whole(smollm2, build):
    """A row of the real Alpaca format through the real tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rows = [
        {"instruction": "Name the capital of France.", "input": "", "output": "Paris."},
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    ]
    report = inspect_data(build(tokenizer, rows), tokenizer)
    trained = [text for s in report.samples for text, is_trained in s.pieces if is_trained]
    assert trained[0] in ("Paris.<|im_end|>", "3<|im_end|>")
    assert report.end_of_turn == "<|im_end|>"
    assert report.warnings == []
