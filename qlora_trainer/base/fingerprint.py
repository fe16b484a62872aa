"""A base's identity in milliseconds: adapters fit the weights they were trained on, and no others.

A local folder has no commit, and hashing hundreds of gigabytes before every run costs minutes. Read
are the configuration, every shard's header (names, types, shapes, places) and a block from the
middle of each tensor: another model, a further trained, a re-quantized or an edited one differs in
it. Given up: a tensor changed only outside its block, as by a fault of the disk, is not noticed.
"""

import hashlib
import json
import struct
from pathlib import Path

from qlora_trainer.base.checkpoint import open_checkpoint

_BLOCK_BYTES = 4096


def base_fingerprint(folder: Path) -> str:
    """SHA-256 in hexadecimal over what tells this base from another.

    Args:
        folder: A local checkpoint of safetensors.

    Raises:
        UserError: The checkpoint is not whole; with every fault found.
    """
    checkpoint = open_checkpoint(folder)
    whole = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name in sorted({header.file for header in checkpoint.tensors.values()}):
        whole.update(name.encode() + _shard_digest(folder / name))
    return whole.hexdigest()


def _shard_digest(path: Path) -> bytes:
    digest = hashlib.sha256(struct.pack("<Q", path.stat().st_size))
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = file.read(length)
        digest.update(header)
        entries = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        for start, stop in sorted(tuple(entry["data_offsets"]) for entry in entries.values()):
            file.seek(8 + length + max(start, (start + stop - _BLOCK_BYTES) // 2))
            digest.update(file.read(min(_BLOCK_BYTES, stop - start)))
    return digest.digest()
