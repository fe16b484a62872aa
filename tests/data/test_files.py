"""Rows come out of every file type whole, with their place, and without holding the file."""

import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.data.faults import FaultLog
from qlora_trainer.data.files import file_type, read_file, read_json_list
from qlora_trainer.data.text_lines import read_lines

ROWS = [{"text": "one"}, {"text": 'zwei\nLinien, "quoted" ünïcödé 🙂'}, {"text": "three"}]


def rows_of(path):
    faults = FaultLog()
    rows = list(read_file(path, faults))
    assert not faults.faults, [str(fault) for fault in faults.faults]
    return rows


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        cells = ['"' + row["text"].replace('"', '""') + '"' for row in rows]
        path.write_text("\n".join(["text", *cells]), encoding="utf-8")
    else:
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        data = text.encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "A.JSONL"]
)
def test_every_file_type_gives_the_same_rows(tmp_path, name):
    assert [row.record for row in rows_of(write(tmp_path / name, ROWS))] == ROWS


def test_rows_know_their_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert [row.where for row in rows_of(path)] == [f"{path}:1", f"{path}:3"]
    assert rows_of(path)[0].record == {"text": "a"}  # the byte order mark is no part of it


def test_rows_of_a_list_know_line_and_number(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\n[\n{"text":\n "a"},\n\n{"text": "b"}]\n')
    assert [row.where for row in rows_of(path)] == [f"{path}:3 (row 1)", f"{path}:6 (row 2)"]


def test_json_lines_in_a_json_file_and_a_list_in_a_jsonl_file_are_read(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "b.jsonl").write_text('[{"text": "a"}, {"text": "b"}]')
    for name in ("a.json", "b.jsonl"):
        assert [row.record["text"] for row in rows_of(tmp_path / name)] == ["a", "b"]


def test_mixed_types_and_differing_schemas_stay_as_they_are(tmp_path):
    """`datasets` would refuse the first and fill the second with nulls."""
    rows = [{"id": 1, "tools": [{"a": {"x": 1}}]}, {"id": "two", "tools": [{"b": {"y": None}}]}]
    assert [row.record for row in rows_of(write(tmp_path / "a.jsonl", rows))] == rows


def test_csv_with_semicolons_or_tabs_is_read(tmp_path):
    for name, mark in (("a.csv", ";"), ("b.tsv", "\t"), ("c.csv", ",")):
        (tmp_path / name).write_text(f"prompt{mark}completion\na{mark}b\n\nc{mark}d\n")
        records = [row.record for row in rows_of(tmp_path / name)]
        assert records == [
            {"prompt": "a", "completion": "b"},
            {"prompt": "c", "completion": "d"},
        ]


def test_a_text_file_gives_a_row_per_line(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \r\n")
    assert [row.record["text"] for row in rows_of(tmp_path / "a.txt")] == ["one", " two "]


def test_nulls_that_arrow_adds_are_dropped(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "name": "x"}]}]
    assert rows_of(write(tmp_path / "a.parquet", rows))[0].record == rows[0]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.jsonl.gz", ".jsonl"), ("a.CSV", ".csv"), ("a.parquet.gz", None), ("a.gz", None)],
)
def test_the_suffix_decides_the_type(tmp_path, name, kind):
    assert file_type(tmp_path / name) == kind


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@settings(deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), max_size=8),
    indent=st.sampled_from([None, 0, 2]),
    buffer=st.integers(1, 40),
)
def test_any_json_list_is_read_through_any_buffer(tmp_path_factory, rows, indent, buffer):
    path = tmp_path_factory.mktemp("list") / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    faults = FaultLog()
    assert [row.record for row in read_json_list(path, faults, buffer)] == rows
    assert not faults.faults


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    path = write(tmp_path / name, [{"text": f"{number} " + "x" * 4000} for number in range(5_000)])
    faults = FaultLog()
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_file(path, faults))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 5_000
    assert peak_bytes < 8 * 2**20  # the file has 20 MB


@pytest.mark.parametrize("start", [b"", b"["])
def test_a_row_that_would_fill_the_memory_is_refused(tmp_path, start):
    path, faults = tmp_path / "rows.json.gz", FaultLog()
    path.write_bytes(gzip.compress(start + b'{"text": "' + b"x" * (1 << 20)))
    if start:
        rows = read_json_list(path, faults, buffer_chars=1 << 10, most_chars=1 << 16)
    else:
        rows = read_lines(path, faults, most_bytes=1 << 16)
    assert list(rows) == []
    assert [fault.problem for fault in faults.faults] == ["a row of more than 64.0 KiB"]
