"""What a measured training run says of itself, and the cards such runs were measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qlora_trainer.memory.gpus import Gpu

CARD = torch.device("meta")
GPUS = {
    "Tesla T4": Gpu("Tesla T4", (7, 5), 40),
    "A100": Gpu("A100", (8, 0), 108),
    "L40S": Gpu("L40S", (8, 9), 142),
}
DTYPES = {
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class Recipe:
    """What one measured row says, in plain values."""

    gpu: str
    model: dict[str, Any]  # values of the model's config, with `family`
    quantization: str
    double_quant: bool
    attention: str  # eager, sdpa (memory-efficient kernel)
    batch_size: int
    seq_len: int
    rank: int
    targets: tuple[str, ...]
    compute_dtype: str
    gradient_checkpointing: bool
    optimizer: str = "adamw"
    norm_dtype: str = "bfloat16"
