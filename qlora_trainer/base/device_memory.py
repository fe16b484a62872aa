"""Memory where a model will be held: how much is free, and giving back what is kept for later."""

import gc
from dataclasses import dataclass

import torch

from qlora_trainer.base.machine import host_memory_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes of the two kinds of memory a model may lie in.

    Attributes:
        host_bytes: Host RAM; of what a model needs, only what is private to its process.
        card_bytes: On the GPU; 0 where there is none.
    """

    host_bytes: int
    card_bytes: int = 0


def free_memory() -> None:
    """Give back what was let go of, on the GPU too, where a fresh process needs it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def memory_left(device: torch.device) -> Memory:
    """What a model on a device can have now, after this process gave back what it kept."""
    free_memory()
    card = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return Memory(host_memory_bytes()[1], card)
