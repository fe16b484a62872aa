"""Rows of different lengths as one rectangle, padded on the right."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def padded(rows: Sequence[Any], pad_id: int) -> dict[str, torch.Tensor]:
    """`input_ids` (B, T) of token lists, and `attention_mask` (B, T): 1 where a token is."""
    shape = (len(rows), max(len(row) for row in rows))
    input_ids = np.full(shape, pad_id, np.int64)
    mask = np.zeros(shape, np.int64)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask)}
