"""Lines of a text file, each with its number, and the rows that are made of them.

Text is read as bytes and decoded line by line, so that a byte that is not UTF-8 is located too.
"""

import codecs
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from qlora_trainer.data.faults import Fault, FaultLog
from qlora_trainer.units import format_bytes

# No row is as long, and a few kilobytes of gzip can hold a line that fills any memory.
MOST_LINE_BYTES = 1 << 28


@dataclass(frozen=True)
class Row:
    """One record and where it came from (`train.jsonl:17`, `train.parquet row 3`)."""

    record: dict[str, Any]
    where: str


def open_binary(path: Path) -> BinaryIO:
    """Open a file, or what a `.gz` file holds, for reading bytes."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> Fault:
    """The fault of a line that cannot be decoded."""
    bad = error.object[error.start]
    return Fault(
        f"{path}:{line}",
        f"not UTF-8 (byte 0x{bad:02x} at byte {error.start + 1} of the line)",
        "save the file as UTF-8 (for example `iconv -f LATIN1 -t UTF-8 OLD > NEW`)",
        "not UTF-8",
    )


def too_long(where: str, most_bytes: int) -> Fault:
    """The fault of a row that is too long to be one."""
    problem = f"a row of more than {format_bytes(most_bytes)}"
    return Fault(where, problem, "write one row per line, and long texts as several rows")


def looks_utf16(path: Path) -> bool:
    """Whether a file begins with a byte order mark of UTF-16."""
    with open_binary(path) as handle:
        return handle.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_lines(
    path: Path, faults: FaultLog, most_bytes: int = MOST_LINE_BYTES
) -> Iterator[tuple[int, str]]:
    """Number and text of every line; a line that is not UTF-8 becomes a fault and is left out."""
    with open_binary(path) as handle:
        for number, raw in enumerate(iter(lambda: handle.readline(most_bytes), b""), 1):
            if len(raw) == most_bytes:
                faults.add(too_long(f"{path}:{number}", most_bytes))
                return
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                faults.add(not_utf8(path, number, error))
