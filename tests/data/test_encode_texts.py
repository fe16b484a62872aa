"""Texts with labels: what a row becomes, and what is said of rows that cannot be used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.data.dataset import EncodedDataset, build_dataset
from qlora_trainer.data.encode_texts import LabelledTextsEncoder
from qlora_trainer.data.labelled_texts import find_problem
from qlora_trainer.data.read import DataSource
from qlora_trainer.errors import UserError
from tests.tasks.tiny_texts import word_tokenizer

NAMES = ["bad", "good"]
Build = Callable[..., EncodedDataset]


def encoder(**settings: Any) -> LabelledTextsEncoder:
    return LabelledTextsEncoder(
        word_tokenizer(), **{"problem": "single", "labels": NAMES, "max_seq_len": 16, **settings}
    )


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def make(rows: list[Any], over_length: str = "raise", **settings: Any) -> EncodedDataset:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        made = encoder(over_length=over_length, **settings)
        return build_dataset(
            [DataSource(str(path))], made, max_seq_len=16, over_length=over_length,
            cache_dir=tmp_path / "cache",
        )  # fmt: skip

    return make


# What is wrong with a row -> what the error says besides file and line.
BAD_ROWS = {
    "no text": ({"label": "good"}, "missing `text`"),
    "empty text": ({"text": "  ", "label": "good"}, "`text` is empty"),
    "text is a number": ({"text": 3, "label": "good"}, "`text`"),
    "empty pair": ({"text": "a film", "text_pair": "", "label": "good"}, "`text_pair` is empty"),
    "no label": ({"text": "a film", "label": None}, "missing `label`"),
    "unknown label": ({"text": "a film", "label": "Good"}, "'Good' is not among the labels"),
    "unknown class": ({"text": "a film", "label": 2}, "class 2 is none of 2"),
    "negative class": ({"text": "a film", "label": -1}, "class -1 is none of 2"),
    "several labels": ({"text": "a film", "label": ["good"]}, "`label` is a list"),
    "a fraction": ({"text": "a film", "label": 0.5}, "`label` is a number"),
    "an object": ({"text": "a film", "label": {"id": 1}}, "`label` is an object"),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_row_is_named_with_file_line_and_way_out(build: Build, bad: str) -> None:
    row, said = BAD_ROWS[bad]
    with pytest.raises(UserError) as caught:
        build([{"text": "a good film", "label": "good"}, row])
    message = str(caught.value)
    assert said in message
    assert "rows.jsonl:2" in message
    assert "; " in message.split(said)[1]  # the way out


def test_all_bad_rows_are_told_at_once(build: Build) -> None:
    with pytest.raises(UserError) as caught:
        build([{"text": "film", "label": "good"}, *(row for row, _ in BAD_ROWS.values())])
    assert all(f"rows.jsonl:{line}:" in str(caught.value) for line in range(2, 2 + len(BAD_ROWS)))


@pytest.mark.parametrize(
    ("label", "said"),
    [("good", "not a list"), (["good", "good"], "stands twice"), (["fine"], "not among")],
)
def test_bad_sets_of_labels_are_named(build: Build, label: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build([{"text": "film", "label": label}], problem="multi")


@pytest.mark.parametrize("label", ["much", float("inf"), True, [1.0]])
def test_what_is_no_number_is_named(build: Build, label: Any) -> None:
    with pytest.raises(UserError, match="not a finite number"):
        build([{"text": "film", "label": label}], problem="regression", labels=[])


def test_missing_fields_name_the_columns_there_are(build: Build) -> None:
    with pytest.raises(UserError, match=r"the rows have review, stars.*columns: \{text: review"):
        build([{"review": "a film", "stars": 5}])


def test_a_long_text_is_refused_or_cut_with_its_end_marked(build: Build) -> None:
    rows = [{"text": "film " * 40, "label": "good"}, {"text": "film", "label": "bad"}]
    with pytest.raises(UserError, match=r"1 of 2 rows.*longer"):
        build(rows)
    cut = build(rows, "truncate")
    end = word_tokenizer().sep_token_id
    assert cut.lengths.tolist() == [16, 3]
    assert cut.input_ids(0)[-1] == end
    assert cut.counts["lost_tokens"] == 42 - 16


def test_a_pair_has_token_types_and_single_texts_none(build: Build) -> None:
    rows = [
        {"text": "a good film", "text_pair": "the dog", "label": "good"},
        {"text": "film", "label": 0},
    ]
    batch = encoder().collate(build(rows), [0, 1])
    assert batch["token_type_ids"].tolist() == [[0] * 5 + [1] * 3, [0] * 8]
    assert batch["attention_mask"].sum(1).tolist() == [8, 3]
    assert batch["targets"].tolist() == [1, 0]


def test_targets_of_several_labels_and_of_numbers(build: Build) -> None:
    rows = [{"text": "film", "label": ["good", 0]}, {"text": "dog", "label": []}]
    many = encoder(problem="multi").collate(build(rows, problem="multi"), [0, 1])
    assert many["targets"].tolist() == [[1.0, 1.0], [0.0, 0.0]]
    rows = [{"text": "film", "label": 2.5}, {"text": "dog", "label": "-1"}]
    made = {"problem": "regression", "labels": []}
    assert encoder(**made).collate(build(rows, **made), [0, 1])["targets"].tolist() == [2.5, -1.0]


@pytest.mark.parametrize(
    ("labels", "problem", "names"),
    [
        (["b", "a", "b"], "single", ["a", "b"]),
        ([2, 0, 2], "single", ["0", "1", "2"]),
        ([True, False], "single", ["0", "1"]),
        ([["b"], [], ["a", "b"]], "multi", ["a", "b"]),
        ([0.5, 1, 2.0], "regression", []),
        ([None, {}, "a"], "single", ["a"]),  # bad rows are told when they are encoded
    ],
)
def test_the_problem_is_what_all_labels_say(labels: Any, problem: str, names: Any) -> None:
    assert find_problem({"text": "film", "label": label} for label in labels) == (problem, names)


def test_nothing_labelled_is_refused() -> None:
    with pytest.raises(UserError, match="no row says a label"):
        find_problem([{"text": "film"}])


def test_findings_tell_rare_labels_and_a_lopsided_balance(build: Build) -> None:
    rows = [{"text": f"film {'dog ' * n}", "label": "good"} for n in range(1, 12)]
    found = encoder().findings(build([*rows, {"text": "film", "label": "bad"}]))
    assert found.labels == [("good", 11), ("bad", 1)]
    assert len(found.warnings) == 2


def test_rows_to_predict_need_no_label(build: Build) -> None:
    rows = build([{"text": "a film"}], labelled=False)
    assert "targets" not in encoder(labelled=False).collate(rows, [0])
