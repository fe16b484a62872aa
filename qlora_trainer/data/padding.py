"""Rows of different lengths as one rectangle, padded on the right."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def pad_rows(rows: Sequence[Any], fill: int) -> torch.Tensor:
    """(B, T) int64 of B lists of numbers, `fill` behind each of them."""
    rectangle = np.full((len(rows), max(len(row) for row in rows)), fill, np.int64)
    for number, row in enumerate(rows):
        rectangle[number, : len(row)] = row
    return torch.from_numpy(rectangle)


def padded(rows: Sequence[Any], pad_id: int) -> dict[str, torch.Tensor]:
    """`input_ids` (B, T) of token lists, and `attention_mask` (B, T): 1 where a token is."""
    mask = pad_rows([np.ones(len(row), np.int64) for row in rows], 0)
    return {"input_ids": pad_rows(rows, pad_id), "attention_mask": mask}
