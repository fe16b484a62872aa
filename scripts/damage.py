"""Files damaged as disks, cut downloads and bad luck damage them.

Standard library only.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATE_FILES = ("adapter.safetensors", "optimizer.safetensors", "trainer.json", "manifest.json")
REGIONS = ("first byte", "header", "middle", "last byte", "cut in half", "emptied", "removed")
_NAN = {"BF16": b"\xc0\x7f", "F16": b"\x00\x7e", "F32": b"\x00\x00\xc0\x7f"}
_SAMPLED_BYTES = 3 * 4096  # smaller tensors are read whole by the base's fingerprint


def corrupt(file: Path, region: str, chance: random.Random) -> None:
    """Damage a file at one of `REGIONS`."""
    size = file.stat().st_size
    if region == "removed":
        file.unlink()
    elif region in ("emptied", "cut in half"):
        os.truncate(file, 0 if region == "emptied" else size // 2)
    else:
        header = chance.randrange(1, min(size, 256))
        middle = chance.randrange(size // 4, 3 * size // 4)
        place = {"first byte": 0, "header": header, "middle": middle, "last byte": size - 1}[region]
        with file.open("rb+") as opened:
            opened.seek(place)
            byte = opened.read(1)[0]
            opened.seek(place)
            opened.write(bytes([byte ^ (1 << chance.randrange(8))]))


@contextmanager
def poisoned(model: Path) -> Iterator[None]:
    """Within, a weight of a base in a folder holds a NaN."""
    file, place, content = _poisonable(model)
    with file.open("rb+") as opened:
        opened.seek(place)
        kept = opened.read(len(content))
        opened.seek(place)
        opened.write(content)
        opened.flush()
        try:
            yield
        finally:
            opened.seek(place)
            opened.write(kept)


def _poisonable(model: Path) -> tuple[Path, int, bytes]:
    """Where a value of a large weight stands that a fingerprint of the base does not look at."""
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as opened:
            length = struct.unpack("<Q", opened.read(8))[0]
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items()):
            begin, end = entry["data_offsets"]
            fits = end - begin > _SAMPLED_BYTES and len(entry["shape"]) == 2
            if fits and "embed" not in name and entry["dtype"] in _NAN:
                return file, 8 + length + begin, _NAN[entry["dtype"]]
    raise SystemExit(f"{model}: has no large weight of 16 or 32 bits to poison")
