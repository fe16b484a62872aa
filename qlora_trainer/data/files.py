"""Rows out of one file, streamed, each with the line or row it stands on.

Files are parsed here and not by `datasets`, for three reasons: its readers cannot say which line is
broken; they force all rows into one Arrow type, which fills the JSON schemas under `tools` with
nulls and refuses mixed types; and they write a second copy of the data. Text is read as bytes and
decoded piece by piece, so that a byte that is not UTF-8 is located too. Nothing is held but the
row at hand (for a JSON list: the row at hand and one buffer).
"""

import codecs
import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_trainer.data.conll import read_conll
from qlora_trainer.data.faults import Fault, FaultLog, json_kind
from qlora_trainer.data.squad import is_squad, read_squad
from qlora_trainer.data.text_lines import (
    MOST_LINE_BYTES,
    Row,
    looks_utf16,
    not_utf8,
    open_binary,
    read_lines,
    too_long,
)

_BUFFER_CHARS = 1 << 20
_HUGE = "a number of more than 4300 digits"  # as many as Python reads
_ONE_PER_LINE = "write one JSON object per line (JSONL), or one list of objects"


def _as_row(value: Any, where: str, faults: FaultLog) -> Iterator[Row]:
    if isinstance(value, dict):
        yield Row(value, where)
    else:
        problem = f"a row is {json_kind(value)}, not an object"
        faults.add(Fault(where, problem, _ONE_PER_LINE, "not an object"))


def read_json_lines(path: Path, faults: FaultLog) -> Iterator[Row]:
    """One object per line; blank lines are skipped, broken ones become faults."""
    for number, line in read_lines(path, faults):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"broken JSON: {error.msg} at column {error.colno}"
            faults.add(Fault(where, problem, f"mend the line; {_ONE_PER_LINE}", "broken JSON"))
            continue
        except RecursionError:
            faults.add(Fault(where, "JSON nested too deeply", "flatten the row", "too deep"))
            continue
        except ValueError:
            faults.add(Fault(where, _HUGE, "write it as text", "huge number"))
            continue
        yield from _as_row(value, where, faults)


def read_json_list(
    path: Path,
    faults: FaultLog,
    buffer_chars: int = _BUFFER_CHARS,
    most_chars: int = MOST_LINE_BYTES,
) -> Iterator[Row]:
    """The objects of one JSON list, parsed out of a moving buffer."""
    with open_binary(path) as handle:
        text = codecs.getreader("utf-8-sig")(handle)
        buffer, position, want = "", 0, buffer_chars
        line, counted, number = 1, 0, 0  # `line` is that of character `counted`
        while True:
            line += buffer.count("\n", counted, position)
            buffer = buffer[position:]
            try:
                more = text.read(want)
            except UnicodeDecodeError as error:
                at = line + buffer.count("\n") + error.object[: error.start].count(b"\n")
                faults.add(not_utf8(path, at, error))
                return
            buffer, position, counted = buffer + more, 0, 0
            try:
                while True:
                    start, value, end = _next_item(buffer, position, number)
                    line, counted = line + buffer.count("\n", counted, start), start
                    if start == end:
                        _check_rest(path, buffer[end + 1 :], line, faults)
                        return
                    number, position, want = number + 1, end, buffer_chars
                    yield from _as_row(value, f"{path}:{line} (row {number})", faults)
            except json.JSONDecodeError as error:
                if not more:
                    at = line + buffer.count("\n", counted, error.pos)
                    problem = f"broken JSON: {error.msg} (after {number} whole rows)"
                    faults.add(Fault(f"{path}:{at}", problem, "mend the list", "broken JSON"))
                    return
                want *= 2  # so that one huge row costs linear time
                if len(buffer) - position > most_chars:
                    faults.add(too_long(f"{path}:{line} (after {number} whole rows)", most_chars))
                    return
            except RecursionError:
                faults.add(Fault(f"{path}:{line}", "JSON nested too deeply", "flatten the row"))
                return
            except ValueError:
                faults.add(Fault(f"{path}:{line}", _HUGE, "write it as text"))
                return


def _next_item(buffer: str, position: int, number: int) -> tuple[int, Any, int]:
    """Start, value and end of item `number`; start equals end at the closing bracket.

    Raises:
        json.JSONDecodeError: It is broken, or the buffer does not reach its end.
    """
    start = _skip_space(buffer, position)
    mark = buffer[start : start + 1]
    if number == 0:  # the caller saw the opening bracket
        start = _skip_space(buffer, start + 1)
        mark = buffer[start : start + 1]
    elif mark == ",":
        start = _skip_space(buffer, start + 1)
    elif mark != "]":
        raise json.JSONDecodeError("Expecting ',' delimiter", buffer, start)
    if mark == "]":
        return start, None, start
    value, end = json.JSONDecoder().raw_decode(buffer, start)
    if end == len(buffer):  # a number may go on in what is not read yet; a list never ends so
        raise json.JSONDecodeError("the list is not closed", buffer, end)
    return start, value, end


_SPACE = re.compile(r"\s*")


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _check_rest(path: Path, rest: str, line: int, faults: FaultLog) -> None:
    start = _skip_space(rest, 0)
    if start < len(rest):
        at = line + rest.count("\n", 0, start)
        faults.add(Fault(f"{path}:{at}", "text after the end of the JSON list", _ONE_PER_LINE))


def read_json(path: Path, faults: FaultLog) -> Iterator[Row]:
    """A JSON list, JSON lines or a SQuAD file, told apart by how it begins, whatever its suffix."""
    with open_binary(path) as handle:
        head = handle.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if is_squad(head):
        return read_squad(path, faults)
    return (read_json_list if head.startswith(b"[") else read_json_lines)(path, faults)


def read_csv(path: Path, faults: FaultLog) -> Iterator[Row]:
    """Comma, semicolon or tab separated values under one header line."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = read_lines(path, faults)
    at, header_line = next(lines, (1, ""))
    if at != 1:
        return  # the header is not UTF-8, which is told
    counts = {mark: header_line.count(mark) for mark in (",", "\t", ";")}
    delimiter = max(counts, key=lambda mark: counts[mark])

    def again() -> Iterator[str]:
        nonlocal at  # counted here: lines that are not UTF-8 never reach the CSV reader
        yield header_line
        for number, line in lines:
            at = number
            yield line

    reader = csv.reader(again(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if header is None:
                header = [cell.strip() for cell in cells]
                continue
            if not cells:
                continue
            where = f"{path}:{at}"
            if len(cells) != len(header):
                problem = f"{len(cells)} cells under a header of {len(header)}"
                remedy = "put cells that hold a comma or a line break in double quotes"
                faults.add(Fault(where, problem, remedy, "cells"))
                continue
            yield Row(dict(zip(header, cells, strict=True)), where)
    except csv.Error as error:
        remedy = 'close every double quote, and write a quote inside a cell as ""'
        faults.add(Fault(f"{path}:{at}", f"broken CSV: {error}", remedy, "broken CSV"))


def read_text(path: Path, faults: FaultLog) -> Iterator[Row]:
    """Every line that is not blank is one row with a `text` field."""
    for number, line in read_lines(path, faults):
        if line.strip():
            yield Row({"text": line.rstrip("\r\n")}, f"{path}:{number}")


def read_parquet(path: Path, faults: FaultLog) -> Iterator[Row]:
    """Rows of a Parquet file, read one batch at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=512):
                for record in batch.to_pylist():
                    number += 1
                    yield Row(without_nulls(record), f"{path} row {number}")
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        problem = f"not a whole Parquet file ({str(error).partition(chr(10))[0]})"
        faults.add(Fault(f"{path}", problem, "write or download the file again", "broken Parquet"))


def without_nulls(value: Any) -> Any:
    """Drop the nulls Arrow puts where one row's struct has a field that another row's lacks."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


READERS: dict[str, Callable[[Path, FaultLog], Iterator[Row]]] = {
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".txt": read_text,
    ".parquet": read_parquet,
    ".conll": read_conll,
    ".bio": read_conll,
    ".iob": read_conll,
}


def file_type(path: Path) -> str | None:
    """The suffix that decides the reader (`.jsonl` of `a.jsonl.gz`), or None if unknown."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    known = suffix.lower() in READERS and not (path.suffix == ".gz" and suffix == ".parquet")
    return suffix.lower() if known else None


def read_file(path: Path, faults: FaultLog) -> Iterator[Row]:
    """The rows of one file of a known type."""
    reader = READERS[file_type(path) or ".jsonl"]
    try:
        if reader is not read_parquet and looks_utf16(path):
            remedy = "save it as UTF-8 (for example `iconv -f UTF-16 -t UTF-8 OLD > NEW`)"
            faults.add(Fault(f"{path}:1", "not UTF-8 but UTF-16", remedy, "not UTF-8"))
            return
        yield from reader(path, faults)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        faults.add(Fault(str(path), f"broken gzip file ({error})", "write or download it again"))
    except OSError as error:
        denied = isinstance(error, PermissionError)
        remedy = "mend its permissions" if denied else "look at the disk, or copy the file anew"
        faults.add(Fault(str(path), f"cannot be read ({error.strerror})", remedy))
