"""Column files of tagged words (CoNLL): a word and its tags a line, a blank line between sentences.

    EU       NNP  B-NP  B-ORG
    rejects  VBZ  B-VP  O

Columns stand apart by a tab if the line has one, else by spaces. The first column is `tokens`, the
last one `tags`; each is also there as `column1`, `column2` ..., so that `columns: {tags: column3}`
picks another. `-DOCSTART-` lines and CoNLL-U's comments (`# name = value`) are left out.
"""

from collections.abc import Iterator
from pathlib import Path

from qlora_trainer.data.faults import Fault, FaultLog
from qlora_trainer.data.text_lines import Row, read_lines


def read_conll(path: Path, faults: FaultLog) -> Iterator[Row]:
    """One row per sentence, placed at its first line."""
    width: int | None = None
    began, words, broken = 0, list[list[str]](), False
    for number, line in read_lines(path, faults):
        if not line.strip() or line.startswith("-DOCSTART-"):
            if words and not broken:
                yield _sentence(words, f"{path}:{began}")
            words, broken = [], False
            continue
        if line.startswith("# ") and " = " in line:
            continue
        cells = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
        width = width or len(cells)
        if len(cells) != width:
            broken = True
            problem = f"{len(cells)} columns, but the file's first word has {width}"
            remedy = "write word and tags, apart by a tab or a space, and blank lines between"
            faults.add(Fault(f"{path}:{number}", problem, remedy, "columns of a word"))
            continue
        began = began if words else number
        words.append(cells)
    if words and not broken:
        yield _sentence(words, f"{path}:{began}")


def _sentence(words: list[list[str]], where: str) -> Row:
    columns = [list(column) for column in zip(*words, strict=True)]
    record = {f"column{index}": column for index, column in enumerate(columns, 1)}
    record["tokens"] = columns[0]
    if len(columns) > 1:
        record["tags"] = columns[-1]
    return Row(record, where)
