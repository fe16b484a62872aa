"""What the processes of a run tell each other: short JSON messages, and errors among them.

Every process sends one and gets everyone's: a `value`, that it is `busy`, which `layer` it needs
gathered, or an `error`: "fault" or, of memory, "memory", and what was `said`.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from qlora_trainer.errors import UserError

Message = dict[str, Any]


class PeerLostError(UserError):
    """Another process of the run is gone, or does not answer."""


class HeardError(Exception):
    """What another process has told has failed, heard where this one only asked for a layer.

    Attributes:
        error: What to raise once out of the block in which the other one failed.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def everyones(message: Message, count: int, hosts: Any) -> list[Message]:
    """Send a message; -> that of each of so many processes, by rank.

    Args:
        message: Of this process.
        count: How many there are.
        hosts: Their group, on CPUs.
    """
    content = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(count)]
    dist.all_gather(sizes, torch.tensor([len(content)]), group=hosts)
    lengths = [int(size) for size in sizes]
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(content)] = content
    found = [torch.zeros_like(padded) for _ in range(count)]
    dist.all_gather(found, padded, group=hosts)
    return [
        json.loads(bytes(answer[:length].tolist()))
        for answer, length in zip(found, lengths, strict=True)
    ]


def first_error(found: Sequence[Message], kind: str) -> str | None:
    """What the first process with an error of this kind said."""
    for rank, message in enumerate(found):
        if message.get("error") == kind:
            return f"process {rank}: {message['said']}" if rank else str(message["said"])
    return None
