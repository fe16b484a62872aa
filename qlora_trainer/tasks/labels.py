"""Labels of a head: what they are called, how often they are given, what rare ones count."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_trainer.data.dataset import EncodedDataset


def head_labels(config: Any) -> tuple[str, ...]:
    """The names a configuration has, in the order of the head's outputs."""
    return tuple(config.id2label[index] for index in sorted(config.id2label))


def known_names(config: Any, names: Sequence[str]) -> list[str]:
    """The labels of a model that has been taught these already, in its order, or these."""
    taught = head_labels(config)
    return list(taught if set(names) <= set(taught) else names)


def count_labels(train: EncodedDataset, column: str, labels: int) -> Any:
    """(C,) How often each label stands in a column of label numbers."""
    counts = np.zeros(labels, np.int64)
    for index in range(len(train)):
        counts += np.bincount(train.column(index, column).astype(np.int64), minlength=labels)
    return counts


def balanced_weights(counts: Any) -> Tensor:
    """(C,) fp32 What each label counts in the loss: N / (P n) of one with n of all N given labels.

    P labels are given at all, so each of these counts as much in the sum over the training rows,
    and a row counts 1 on average. One that is never given counts 1: a held-out row of it must
    still count.

    Args:
        counts: (C,) How often each label is given.

    >>> balanced_weights(np.array([6, 2, 0])).tolist()
    [0.6666666865348816, 2.0, 1.0]
    """
    present = counts > 0
    shares = counts.sum() / (max(present.sum(), 1) * np.maximum(counts, 1))
    return torch.from_numpy(np.where(present, shares, 1.0).astype(np.float32))
