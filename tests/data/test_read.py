"""A source is a file, a pattern, a folder, a saved data set or a hub name."""

import gzip
import json

import datasets
import pytest

from qlora_trainer.data.faults import FaultLog
from qlora_trainer.data.read import DataSource, open_source
from qlora_trainer.errors import UserError


def write(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))


def read_rows(source):
    faults = FaultLog()
    yield from open_source(source).rows(faults)
    faults.raise_if_any("cannot be read")


def texts(source):
    return [row.record["text"] for row in read_rows(source)]


def test_a_file_a_pattern_and_a_folder_are_read_in_order(tmp_path):
    write(tmp_path / "b.jsonl", "b1", "b2")
    write(tmp_path / "a.jsonl", "a1")
    (tmp_path / "notes.md").write_text("not data")
    assert texts(DataSource(str(tmp_path / "b.jsonl"))) == ["b1", "b2"]
    assert texts(DataSource(str(tmp_path / "*.jsonl"))) == ["a1", "b1", "b2"]
    assert texts(DataSource(str(tmp_path))) == ["a1", "b1", "b2"]


def test_a_folder_has_splits_by_file_name(tmp_path):
    write(tmp_path / "data" / "train-00000.jsonl", "t")
    write(tmp_path / "data" / "test-00000.jsonl", "e")
    assert texts(DataSource(str(tmp_path))) == ["t"]
    assert texts(DataSource(str(tmp_path), split="test")) == ["e"]


def test_a_split_is_a_word_of_a_name_not_a_part_of_one(tmp_path):
    write(tmp_path / "constrained.jsonl", "c")
    write(tmp_path / "trainers" / "a.jsonl", "a")
    assert texts(DataSource(str(tmp_path))) == ["c", "a"]  # no train split: all that is there
    with pytest.raises(UserError, match="split 'train' is empty: no file's path names it"):
        open_source(DataSource(str(tmp_path), split="train"))
    write(tmp_path / "my_train.jsonl", "t")
    write(tmp_path / "val" / "b.jsonl", "v")
    assert texts(DataSource(str(tmp_path))) == ["t"]
    assert texts(DataSource(str(tmp_path), split="validation")) == ["v"]


def test_a_saved_data_set_is_read_with_its_splits(tmp_path):
    train = datasets.Dataset.from_list([{"text": "t1"}, {"text": "t2"}])
    test = datasets.Dataset.from_list([{"text": "e"}])
    train.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=train, test=test).save_to_disk(str(tmp_path / "many"))
    assert texts(DataSource(str(tmp_path / "one"))) == ["t1", "t2"]
    assert texts(DataSource(str(tmp_path / "many"))) == ["t1", "t2"]
    assert texts(DataSource(str(tmp_path / "many"), split="test")) == ["e"]
    rows = list(read_rows(DataSource(str(tmp_path / "one"))))
    assert rows[1].where == f"{tmp_path}/one row 2"
    with pytest.raises(UserError, match="no split 'dev'; set `split` to one of train, test"):
        open_source(DataSource(str(tmp_path / "many"), split="dev"))


def test_several_splits_without_train_need_one_named(tmp_path):
    one = datasets.Dataset.from_list([{"text": "x"}])
    datasets.DatasetDict(dev=one, test=one).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(UserError, match="several splits and none was chosen; set `split` to one"):
        open_source(DataSource(str(tmp_path / "d")))


def test_a_broken_saved_data_set_is_refused(tmp_path):
    datasets.Dataset.from_list([{"text": "x"}]).save_to_disk(str(tmp_path / "d"))
    for part in (tmp_path / "d").glob("*.arrow"):
        part.unlink()
    with pytest.raises(UserError, match="not a whole `save_to_disk` folder"):
        open_source(DataSource(str(tmp_path / "d")))


def test_structs_of_a_saved_data_set_lose_the_nulls_arrow_added(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "name": "f"}]}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "d"))
    (row,) = read_rows(DataSource(str(tmp_path / "d")))
    assert row.record == rows[0]


def test_the_identity_follows_content_not_place(tmp_path):
    write(tmp_path / "a.jsonl", "x")
    write(tmp_path / "b.jsonl", "x")
    write(tmp_path / "c.jsonl", "y")
    a, b, c = (open_source(DataSource(str(tmp_path / f"{n}.jsonl"))).identity for n in "abc")
    assert a == b != c


def test_unreadable_rows_are_all_named_at_the_end(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{\n{"text": "b"}\n}')
    rows = read_rows(DataSource(str(tmp_path / "a.jsonl")))
    assert next(rows).record == {"text": "a"}
    with pytest.raises(UserError, match=r"(?s)2 faults.*jsonl:2.*jsonl:4"):
        list(rows)


def test_compressed_files_are_read(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'[{"text": "a"}]'))
    assert texts(DataSource(str(tmp_path / "a.json.gz"))) == ["a"]
